"""Who says what where many runs share a process: lines with a label before them, `[0003] step 10/60  loss 5.1`."""

import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO, cast

LABELLED = re.compile(r"\[([^\]]+)\] (.*)", re.DOTALL)
"""(label, what was said) of a line."""

ENDED = re.compile(r"lmjax: exit code (\d+)")
"""The last line of a labelled run on stderr, as `ended` writes it."""


def ended(code: int) -> None:
    print(f"lmjax: exit code {code}", file=sys.stderr)


@contextlib.contextmanager
def labelling() -> Iterator[None]:
    """Until it ends, what a thread prints `under` a label has it before each line; what others print is as it was."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Labelled(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def under(label: str) -> Iterator[None]:
    """What this thread prints is said by `label`."""
    _here.label = label
    try:
        yield
    finally:
        del _here.label


_here = threading.local()


class _Labelled:
    """A stream whose labelled lines go through whole. It is no terminal: many would draw on one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock = stream, threading.Lock()
        self._begun = threading.local()
        """The line that each thread has begun."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        label = getattr(_here, "label", None)
        if label is None:
            return self._stream.write(text)
        *lines, self._begun.text = (getattr(self._begun, "text", "") + text).split("\n")
        with self._lock:
            self._stream.write("".join(f"[{label}] {line}\n" for line in lines))
            self._stream.flush()
        return len(text)
