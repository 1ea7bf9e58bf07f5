"""The one decorator that makes a config class: frozen, typed, closed, validated on construction."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")

# Lax parsing turns the command line's 1e4 into 10000 for an int; nan and inf never make a sensible setting.
_CONFIG = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config_class(cls: type[T]) -> type[T]:
    """Make `cls` a frozen keyword-only pydantic dataclass; a string under a field is its documentation."""
    decorate: Callable[[Any], Any] = dataclass(frozen=True, kw_only=True, config=_CONFIG)
    return decorate(cls)
