"""What is said on stderr while a command runs: warnings, a line each, without secrets or what acts on a terminal."""

import logging
import sys

from lmjax.errors import visible
from lmjax.process.redact import hide


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(hide(super().format(record)))


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def show_warnings(prefix: str = "") -> None:
    """Print warnings from here on, each after `prefix`; what was set up before is replaced."""
    handler = _Stderr()
    handler.setFormatter(_Visible(prefix + "%(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
