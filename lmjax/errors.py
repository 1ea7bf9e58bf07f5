"""Errors a user can act on. Each class carries the exit code that job schedulers act on.

The command line prints such an error as one line (what, where, what to do) and exits with its code; anything else is a
bug and exits with 1. Inside the library `assert` guards our own invariants, these classes guard the user's input.
"""

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


class NumericalError(LmjaxError):
    """Training produced too many non-finite updates in a row."""

    exit_code = 5


class StallError(LmjaxError):
    """A peer was lost or a step did not finish in time."""

    exit_code = 6


def one_line(error: BaseException, limit: int | None = None) -> str:
    """What an error says, in one line of at most `limit` characters; its class where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
