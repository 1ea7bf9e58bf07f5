"""Packages of the extra `lmjax[curate]`, imported where a step first needs them."""

import importlib
from types import ModuleType

from lmjax.errors import DataError


def load(name: str, step: str) -> ModuleType:
    """The module. Raises DataError that names the extra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise DataError(f"the step {step} needs {package} ({error}): install lmjax[curate]") from error
