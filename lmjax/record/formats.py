"""What a file says of the lmjax that wrote it, and whether this one can read it.

    {"lmjax": {"format": 1, "version": "0.1.0"}, ...}

A format is counted up when what was written before could be misread, and older ones are read for ever. Files from
before they said so are of format 1.
"""

import functools
import importlib.metadata
import os
from collections.abc import Mapping
from typing import Any

from lmjax.errors import LmjaxError

STAMP = "lmjax"


@functools.cache
def version() -> str:
    """Of this lmjax."""
    return importlib.metadata.version("lmjax")


def stamp(known: int) -> dict[str, Any]:
    """What a file of the format `known` has beside its content."""
    return {STAMP: {"format": known, "version": version()}}


def unstamped(
    document: Mapping[str, Any], path: str | os.PathLike[str], known: int, error: type[LmjaxError]
) -> dict[str, Any]:
    """The content of a file without its stamp. Raises `error` when a later lmjax wrote it in a later format."""
    content = dict(document)
    written = content.pop(STAMP, {"format": 1})
    if not isinstance(written, Mapping):
        written = {}
    check(path, written.get("format"), written.get("version"), known, error)
    return content


def check(path: str | os.PathLike[str], found: Any, by: Any, known: int, error: type[LmjaxError]) -> None:
    """Raise `error` unless a file's format is one of 1 to `known`, naming the version that it was written `by`."""
    if type(found) is not int or not 1 <= found <= known:
        writer = f"lmjax {by}" if isinstance(by, str) else "another lmjax"
        raise error(
            f"{os.fspath(path)}: written by {writer} in format {found!r}, this is lmjax {version()}, which reads "
            f"formats 1 to {known}; use the version that wrote it, or a later one"
        )


def origin(document: Mapping[str, Any]) -> str:
    """`written by lmjax 0.1.0, this is 0.2.0`: to explain what a file says that cannot be understood."""
    written = document.get(STAMP)
    by = written.get("version") if isinstance(written, Mapping) else None
    return f"written by {f'lmjax {by}' if isinstance(by, str) else 'an earlier lmjax'}, this is {version()}"
