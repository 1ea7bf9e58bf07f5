"""The process around training: start-up, signals, watchdog, exit codes, fault hooks, facts about the machine.

Nothing heavy is imported at the top: `tune_allocator` runs before JAX is loaded.
"""

import ctypes
import errno
import faulthandler
import functools
import hashlib
import importlib.metadata
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lmjax import distributed
from lmjax.errors import BUG, DONE, PREEMPTED, CheckpointError, ConfigError, LmjaxError, StallError

logger = logging.getLogger(__name__)


# --- Start-up ---------------------------------------------------------------------------------------------------------


def tune_allocator(argv: Sequence[str] = sys.orig_argv) -> None:
    """Run this process again, once, with huge pages for malloc; call it before importing JAX.

    On CPU most of a step's temporary memory is fresh pages, and faulting them in one by one costs 20 to 90% of the
    speed. glibc reads the setting before Python starts, so the process replaces itself: same pid, same arguments.
    Nothing happens off glibc, beside an accelerator, or when GLIBC_TUNABLES is set (to anything: that is the opt-out).

    `argv` is the interpreter's own argument vector, including `-m` or the script.
    """
    if "GLIBC_TUNABLES" in os.environ or not _on_glibc() or _has_accelerator():
        return
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *argv[1:]], environment)


def return_freed_memory() -> None:
    """Have glibc give blocks of 1 MiB and more back to the system as soon as they are freed.

    It would keep them for reuse: a process that moves large arrays about then holds up to twice what it uses. Each
    new block is fresh pages, which training would pay for in speed (see `tune_allocator`).
    """
    if _on_glibc():
        m_mmap_threshold = -3
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)


def _on_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


def _has_accelerator() -> bool:
    """A guess that needs no JAX: the platform asked for, else the device files of NVIDIA, AMD and TPU drivers."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    return any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0"))


def enable_compile_cache(directory: str | None = None) -> None:
    """Keep compiled programs on disk, so that a restart does not compile again.

    `directory` defaults to `$XDG_CACHE_HOME/lmjax/xla` (`~/.cache/lmjax/xla`), one folder per kind of CPU: programs
    hold machine code, and home directories are shared. JAX's own variables JAX_COMPILATION_CACHE_DIR and
    JAX_ENABLE_COMPILATION_CACHE=false take precedence.
    """
    import jax

    if directory is None:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        directory = os.path.join(root, "lmjax", "xla", _cpu_kind())
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _cpu_kind() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        described = "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        described = " ".join(os.uname())
    return hashlib.blake2b(described.encode(), digest_size=4).hexdigest()


# --- The end of a process ---------------------------------------------------------------------------------------------

_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}


def run_main(function: Callable[[], int | None], *, debug: bool) -> NoReturn:
    """Call `function`, then exit with its return value (None is 0) or with the code of the error that it raised.

    An error is one last line on stderr, `lmjax: error: <what, where, what to do>`. Tracebacks are for `--debug`; that
    of a bug is also kept in a file that the line names.
    """
    try:
        sys.exit(function() or DONE)
    except LmjaxError as error:
        _fail(_one_line(error), error.exit_code, debug)
    except KeyboardInterrupt:
        _fail("interrupted", 128 + signal.SIGINT, debug)
    except BrokenPipeError:  # whoever read our output has left, as `| head` does
        os._exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno in _STORAGE_ERRNOS:
            _fail(f"storage: {_one_line(error)}; free or mend it and run again", CheckpointError.exit_code, debug)
        _fail_bug(error, debug)
    except Exception as error:
        _fail_bug(error, debug)


def _fail_bug(error: Exception, debug: bool) -> NoReturn:
    with tempfile.NamedTemporaryFile("w", prefix="lmjax-traceback-", suffix=".txt", delete=False) as file:
        file.write(traceback.format_exc())
    _fail(f"{type(error).__name__}: {_one_line(error)} (this is a bug; traceback in {file.name})", BUG, debug)


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    exit_now(message, code)


def exit_now(message: str, code: int) -> NoReturn:
    """Print the last line and leave without waiting for any thread: one that hangs must not hold up the exit code."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    print(f"lmjax: error: {distributed.name()}{message}", file=sys.stderr, flush=True)
    os._exit(code)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- Signals and stalls -----------------------------------------------------------------------------------------------


def leave_on_sigterm() -> None:
    """Until `Preemption` takes over, SIGTERM ends this process at once with PREEMPTED: there is nothing to save yet."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        exit_now("SIGTERM before the first step: nothing to save; run the same command again", PREEMPTED)

    signal.signal(signal.SIGTERM, leave)


class Preemption:
    """SIGTERM or SIGINT asks for a checkpoint at the next step boundary; a second signal exits at once.

        with Preemption() as preemption:
            for step in ...:
                if preemption.requested: save, return PREEMPTED

    Python runs signal handlers only between bytecodes, so not during a compilation of minutes. A thread therefore
    reads the signals from the wake-up pipe, which the C handler fills at any time.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._requested = threading.Event()

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def __enter__(self) -> "Preemption":
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._listener = threading.Thread(target=self._listen, name="lmjax-signals", daemon=True)
        self._listener.start()
        self._old_handlers = [signal.signal(number, self._handle) for number in self._SIGNALS]
        self._old_wakeup = signal.set_wakeup_fd(self._write.fileno())
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in zip(self._SIGNALS, self._old_handlers, strict=True):
            signal.signal(number, handler)
        self._write.close()  # ends the thread, once it has said what it received
        self._listener.join(timeout=1)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested.set()

    def _listen(self) -> None:
        seen = False
        with self._read:
            while data := self._read.recv(1):
                if (number := data[0]) not in self._SIGNALS:
                    continue
                name = signal.Signals(number).name
                if seen:
                    exit_now(f"second {name}: exit without saving", 128 + number)
                seen = True
                self._requested.set()
                distributed.say(f"{name}: saving at the next step boundary (again to exit at once)")


class Watchdog:
    """Ends the process with exit code 6 and every thread's stack when `beat` was not called for `timeout` seconds.

    A lost peer or a dead file system otherwise blocks a step for ever. `timeout=None` watches nothing.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._stopped = threading.Event()
        self.beat("start")

    def beat(self, doing: str) -> None:
        """Progress was made; `doing` names what starts now, for the message."""
        self._doing, self._since = doing, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._timeout is not None:
            self.beat("start")
            threading.Thread(target=self._watch, args=(self._timeout,), name="lmjax-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _watch(self, timeout: float) -> None:
        while not self._stopped.wait(min(1.0, timeout / 4)):
            if time.monotonic() - self._since > timeout:
                faulthandler.dump_traceback(all_threads=True)
                exit_now(
                    f"no progress for {timeout:g} s during {self._doing}; the stacks above show where; "
                    "run again to resume from the last checkpoint",
                    StallError.exit_code,
                )


# --- Fault hooks ------------------------------------------------------------------------------------------------------


def _raise_disk_full() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _raise_error() -> NoReturn:
    raise RuntimeError("injected by LMJAX_FAULTS")


# What a fault does. None: the code at the hook knows, `fault` only returns the name.
FAULTS: dict[str, Callable[[], object] | None] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "stall": lambda: time.sleep(1e6),
    "raise": _raise_error,
    "disk_full": _raise_disk_full,
    "nan_grad": None,
}


def fault(site: str, index: int | None = None) -> str | None:
    """A named place where a test can make things go wrong; without LMJAX_FAULTS it does nothing.

    LMJAX_FAULTS is a comma-separated list of `what@site:n`: `kill@step:20` kills the process at `fault("step", 20)`;
    at a site without `index`, n counts the calls from 1 (`disk_full@checkpoint.write:2`). `kill@step:20:1` does so at
    process 1 alone. Returns the fault's name when the caller is to act on it (`nan_grad`), else None. Raises
    ConfigError for a malformed list.
    """
    planned = _planned_faults(os.environ.get("LMJAX_FAULTS", ""), distributed.process())
    if site not in planned:
        return None
    if index is None:
        index = _calls[site] = _calls.get(site, 0) + 1
    name = planned[site].get(index)
    if name is None:
        return None
    distributed.say(f"LMJAX_FAULTS: {name} at {site}:{index}")
    act = FAULTS[name]
    if act is None:
        return name
    act()
    return None


_calls: dict[str, int] = {}


@functools.cache
def _planned_faults(text: str, process: int) -> dict[str, dict[int, str]]:
    """`{site: {n: fault}}` of this process."""
    planned: dict[str, dict[int, str]] = {}
    for entry in filter(None, text.split(",")):
        match = re.fullmatch(rf"({'|'.join(FAULTS)})@([^:]+):(\d+)(?::(\d+))?", entry)
        if match is None:
            raise ConfigError(f"LMJAX_FAULTS: '{entry}' is not what@site:n with what one of {', '.join(FAULTS)}")
        name, site, index, at_process = match.groups()
        if at_process is None or int(at_process) == process:
            planned.setdefault(site, {})[int(index)] = name
    return planned


# --- Facts ------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions, devices and source revision, for reports and run records."""
    import jax

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "lmjax": importlib.metadata.version("lmjax"),
        "python": ".".join(map(str, sys.version_info[:3])),
        **{package: importlib.metadata.version(package) for package in packages},
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **_git_revision(),
    }


def _git_revision() -> dict[str, Any]:
    """`git_commit` and `git_dirty` of the checkout that this file is tracked in; empty for an installed package."""
    source = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}
