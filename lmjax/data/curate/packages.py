"""Packages of the extras `lmjax[curate]` and `lmjax[names]`, imported where a step first needs them."""

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterable
from types import ModuleType

from lmjax.errors import DataError

_OF_STEP = {
    "extract": "trafilatura",
    "repair": "ftfy",
    "language": "py3langid",
    "names": "spacy",
    "near_duplicates": "rensa",
}


def load(name: str, step: str) -> ModuleType:
    """The module. Raises DataError that names the extra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package, extra = name.split(".")[0], "names" if step == "names" else "curate"
        raise DataError(f"the step {step} needs {package} ({error}): install lmjax[{extra}]") from error


def versions(steps: Iterable[str]) -> dict[str, str]:
    """Of the packages that these steps use, and that are there: another version may give another result."""
    found = {}
    for package in sorted({_OF_STEP[step] for step in steps if step in _OF_STEP}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
