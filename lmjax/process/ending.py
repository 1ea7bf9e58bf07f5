"""How a process ends: one line on stderr and an exit code that a scheduler can act on."""

import contextlib
import errno
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from lmjax.errors import (
    BUG,
    DONE,
    PREEMPTED,
    CheckpointError,
    ConfigError,
    LmjaxError,
    StallError,
    StorageError,
    one_line,
    visible,
)
from lmjax.process import faults, group, messages
from lmjax.process.redact import hide

_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
_STORAGE_ERRNOS |= {errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE}


def run_main(function: Callable[[], int | None], *, debug: bool) -> NoReturn:
    """Call `function`, then exit with its return value (None is 0) or with the code of the error that it raised.

    An error is one last line on stderr, `lmjax: error: <what, where, what to do>`. Tracebacks are for `--debug`; that
    of a bug is also kept in a file that the line names.
    """
    messages.show_warnings()
    try:
        faults.check()
        code = function() or DONE
        gc.freeze()  # or the interpreter looks through all that there is for garbage before it ends: 0.3 s
        sys.exit(code)
    except BrokenPipeError:  # whoever read our output has left, as `| head` does
        os._exit(128 + signal.SIGPIPE)
    except (Exception, KeyboardInterrupt) as error:
        code, message = explained(error)
        if debug:
            print(hide(traceback.format_exc()), end="", file=sys.stderr)
        exit_now(message, code)


def explained(error: BaseException) -> tuple[int, str]:
    """The exit code that an error ends a run with, and what is said of it; the traceback of a bug is kept in a file."""
    if isinstance(error, LmjaxError | StorageError):
        return error.exit_code, one_line(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError) or (
        isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS
    ):
        return CheckpointError.exit_code, f"storage: {one_line(error)}; free or mend it and run again"
    return BUG, f"{type(error).__name__}: {one_line(error)} (this is a bug; {_kept_traceback(error)})"


def _kept_traceback(error: BaseException) -> str:
    import tempfile

    try:
        with tempfile.NamedTemporaryFile("w", prefix="lmjax-traceback-", suffix=".txt", delete=False) as file:
            file.write(hide("".join(traceback.format_exception(error))))
    except OSError:
        return "there was no room for its traceback: --debug shows it"
    return f"traceback in {file.name}"


@contextlib.contextmanager
def within_memory(sizes: str) -> Iterator[None]:
    """Sizes that the machine cannot hold are the user's to lower, not a bug."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(f"this takes more memory than there is; lower {sizes}") from error


def exit_now(message: str, code: int) -> NoReturn:
    """Print the last line and leave without waiting for any thread: one that hangs must not hold up the exit code."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    if code == StallError.exit_code:
        message += "".join(_within(_LAST_WORD_SECONDS, word) for word in _last_words)
    print(f"lmjax: error: {group.name()}{visible(hide(message))}", file=sys.stderr, flush=True)
    os._exit(code)


_LAST_WORD_SECONDS = 3.0
_last_words: list[Callable[[], str]] = []


@contextlib.contextmanager
def last_word(word: Callable[[], str]) -> Iterator[None]:
    """What else is done, and said at the end of the last line, when this process gives the others up, meanwhile."""
    _last_words.append(word)
    yield
    _last_words.remove(word)  # not after an error, which may turn out to be that others are lost


def _within(seconds: float, word: Callable[[], str]) -> str:
    """What it says, or nothing if it takes too long: the storage may be what hangs."""
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(word()), daemon=True)
    thread.start()
    thread.join(seconds)
    return "".join(said)


def leave_on_sigterm() -> None:
    """Until `Preemption` takes over, SIGTERM ends this process at once with PREEMPTED: there is nothing to save yet."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        exit_now("SIGTERM before the first step: nothing to save; run the same command again", PREEMPTED)

    signal.signal(signal.SIGTERM, leave)
