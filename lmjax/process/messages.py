"""What is said on stderr while a command runs: warnings, one line each, in which nothing can act on a terminal."""

import logging
import sys

from lmjax.errors import visible


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def show_warnings(prefix: str = "") -> None:
    """Print warnings from here on, each after `prefix`; what was set up before is replaced."""
    handler = _Stderr()
    handler.setFormatter(_Visible(prefix + "%(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
