"""The one decorator that makes a config class: frozen, typed, closed, validated on construction."""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from lmjax.errors import ConfigError

T = TypeVar("T")

# Lax parsing turns the command line's 1e4 into 10000 for an int; nan and inf never make a sensible setting.
_CONFIG = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

# Numbers that arrays are indexed and counted by: int64 holds them all.
PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(gt=0, le=1 << 24)]
"""How long an axis of an array is: with more, no machine could hold it, or even say so."""
Seed = Annotated[int, Field(ge=0, lt=2**64)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def first_problem(error: pydantic.ValidationError) -> str:
    """`sources.a.cursor: Input should be a valid integer`: what first does not fit, and where."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'as a whole'}: {first['msg']}"


def validated(cls: type[T], values: Mapping[str, Any], where: str = "", *, strict: bool = False) -> T:
    """A config object of nested plain values. Raises ConfigError naming the first key that does not fit.

    `where` goes before the key in the message, as in `config.` or `--`. If `strict`, values have the types of JSON:
    neither '4' nor true is a number.
    """
    try:
        if strict:
            return pydantic.TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        return pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigError(_describe(error, where)) from None
    except UnicodeEncodeError as error:
        raise ConfigError(_short(f"{where}{error.object!r} is no text: it has bytes that are not UTF-8")) from None


def _describe(error: pydantic.ValidationError, where: str) -> str:
    first = error.errors()[0]
    path = where + ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("value_error", "unexpected_keyword_argument"):
        return _short(f"{path}: {message}" if first["loc"] else message)
    return _short(f"{path}={first['input']!r}: {message[0].lower()}{message[1:]}")


def _short(message: str) -> str:
    """Shorten a message by the middle of a value, which nobody would read."""
    return message if len(message) <= 400 else f"{message[:190]} ... {message[-190:]}"


def one_of(names: Iterable[str]) -> pydantic.AfterValidator:
    """Make the validator in `Annotated[str, one_of(REGISTRY)]`: a choice that grows with the registry it names."""
    choices = list(names)

    def check(name: str) -> str:
        return chosen(name, choices)

    check.choices = choices  # type: ignore[attr-defined]  # for docs/config_page.py
    return pydantic.AfterValidator(check)


def chosen(name: str, choices: Sequence[str]) -> str:
    """The name. Raises ValueError, with the nearest choice or all of them, if it is none."""
    if name not in choices:
        close = difflib.get_close_matches(name, choices, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(choices)}"
        raise ValueError(f"there is no '{name}' ({hint})")
    return name


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config_class(cls: type[T]) -> type[T]:
    """Make `cls` a frozen keyword-only pydantic dataclass; a string under a field is its documentation."""
    decorate: Callable[[Any], Any] = dataclass(frozen=True, kw_only=True, config=_CONFIG)
    return decorate(cls)
