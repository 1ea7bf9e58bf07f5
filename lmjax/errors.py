"""Errors a user can act on. Each class carries the exit code that job schedulers act on.

The command line prints such an error as one line (what, where, what to do) and exits with its code; anything else is a
bug and exits with 1. Inside the library `assert` guards our own invariants, these classes guard the user's input.
"""

import re

DONE = 0
BUG = 1
PREEMPTED = 75  # EX_TEMPFAIL: the state is saved, or no step was taken yet; run the same command again


class LmjaxError(ValueError):
    """Base class: a one-line message that says what is wrong, where, and what to do."""

    exit_code = BUG


class ConfigError(LmjaxError):
    """A config or command line that cannot work."""

    exit_code = 2


class DataError(LmjaxError):
    """Input text, a tokenizer or a prepared data set that is missing, damaged or does not fit."""

    exit_code = 3


class CheckpointError(LmjaxError):
    """A checkpoint or the storage under it that cannot be read or written."""

    exit_code = 4


class StorageError(Exception):
    """A bucket that did not answer, however often it was asked.

    Neither a ValueError, as those above are, nor an OSError: whoever catches these takes them for damage or absence,
    and nothing is known of what lies there.
    """

    exit_code = CheckpointError.exit_code


class NumericalError(LmjaxError):
    """Training produced too many non-finite updates in a row."""

    exit_code = 5


class StallError(LmjaxError):
    """A peer was lost or a step did not finish in time."""

    exit_code = 6


def one_line(error: BaseException, limit: int = 1000) -> str:
    """What an error says, in one visible line of about `limit` characters at most; its class where it says nothing.

    A key, a value or a path that nobody would read to its end is cut in its middle, then the whole line is.
    """
    words = [_cut(word, 300) for word in visible(str(error)).split()]
    return _cut(" ".join(words), limit) or type(error).__name__


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head, tail = limit * 2 // 3, limit // 3
    return f"{text[:head]}...({len(text) - head - tail} more)...{text[-tail:]}"


def visible(text: str) -> str:
    """The text with spelled out (`\\x1b`) what a terminal would act upon: control characters but newline and tab, marks
    that turn the direction of writing, and what no terminal can print."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")
