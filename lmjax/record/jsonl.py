"""Append-only files of JSON lines: one object per line, flushed line by line.

A killed process loses at most the line it was writing; that torn line is cut off when the file is opened again. Floats
are written so that they read back to the same bits. NaN and infinities, which JSON lacks, are the strings "NaN",
"Infinity" and "-Infinity".
"""

import contextlib
import errno
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from lmjax.errors import CheckpointError
from lmjax.record import formats
from lmjax.record.files import is_remote, room

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of metrics.jsonl and ledger.jsonl: the first line of every attempt is stamped with it."""


class JsonLines:
    """Raises CheckpointError when the storage fails: a run whose record cannot be written must not go on.

    Object stores cannot append. There the lines are kept in a local file, and `sync` and `close` upload it whole.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self._path = epath.Path(path)
        self._local = not is_remote(self._path)
        with _storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a+b", buffering=0) if self._local else self._copy()  # noqa: SIM115
            self._cut_torn_line()

    def write(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(_encode(record), allow_nan=False) + "\n").encode()
        with _storage_errors(self._path, len(line)):
            if self._file.write(line) != len(line):  # as much as there was room for
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Force what is written to the storage; call before a checkpoint is sealed."""
        with _storage_errors(self._path):
            if self._local:
                os.fsync(self._file.fileno())
            else:
                self._file.seek(0)
                self._path.write_bytes(self._file.read())

    def close(self) -> None:
        self.sync()
        self._file.close()

    def _copy(self) -> Any:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        if self._path.exists():
            file.write(self._path.read_bytes())
        return file

    def _cut_torn_line(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            logger.warning("%s ends in a torn line of %d bytes, which is cut off", self._path, len(content) - end)
        self._file.truncate(end)
        self._file.seek(end)


@contextlib.contextmanager
def _storage_errors(path: epath.Path, size: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}{room(error, path, size)}"
        raise CheckpointError(f"storage: cannot write {path}: {reason}; free or mend it and run again") from error


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON has them: None for a number that there is none of, as the standard error of one item."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _encode(value: Any) -> Any:
    """Plain JSON values; arrays become Python numbers and lists."""
    if isinstance(value, Mapping):
        return {str(name): _encode(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(child) for child in value]
    if hasattr(value, "tolist"):
        return _encode(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(record: dict[str, Any]) -> dict[str, Any]:
    return {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}


def parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if it is damaged or torn."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return _decode(record) if isinstance(record, dict) else None


def read_lines(path: epath.PathLike) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file in order, without stamps; a torn or damaged line is left out with a warning.

    Raises CheckpointError for what a later lmjax wrote in a later format.
    """
    for number, line in enumerate(epath.Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip(b"\0 \r"):
            continue
        if (record := parsed(line)) is not None:
            yield formats.unstamped(record, path, FORMAT, CheckpointError)
        else:
            logger.warning("%s: line %d is damaged or torn and is left out", path, number)
