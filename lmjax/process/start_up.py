"""What a process sets before anything else, its allocator and compile cache, and what it says of itself."""

import contextlib
import ctypes
import gc
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD = -3  # of malloc.h
_NEVER = 1 << 36  # bytes, more than is ever asked for or freed
TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "arena_max": 1, "mmap_threshold": _NEVER, "trim_threshold": _NEVER}.items()
)


def tune_allocator(argv: Sequence[str] = sys.orig_argv) -> None:
    """Run this process again, once, with a malloc that keeps what is freed, in huge pages; call it before importing
    JAX.

    On CPU a step's temporary memory is one block, which it takes and frees. As fresh pages, which the system clears
    one by one, it costs a tenth to a third of a step. One arena serves all threads, for in others large blocks are
    fresh pages, too. glibc reads the settings before Python starts, so the process replaces itself: same pid, same
    arguments. Nothing happens off glibc, beside an accelerator, or when GLIBC_TUNABLES is set (to anything: that is the
    opt-out).

    `argv` is the interpreter's own argument vector, including `-m` or the script.
    """
    if "GLIBC_TUNABLES" in os.environ or not _on_glibc() or accelerator():
        return
    environment = {**os.environ, "GLIBC_TUNABLES": TUNABLES}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *argv[1:]], environment)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage meanwhile: what imports make is there to stay, and to look through it takes a tenth of their
    time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def give_back_memory() -> None:
    """Give the system what a tuned malloc has kept up to now: what compiling, evaluating or saving left behind."""
    if os.environ.get("GLIBC_TUNABLES") == TUNABLES:
        ctypes.CDLL(None).malloc_trim(0)


def return_freed_memory() -> None:
    """Have glibc give blocks of 1 MiB and more back to the system as soon as they are freed.

    It would keep them for reuse: a process that moves large arrays about then holds up to twice what it uses. Each
    new block is fresh pages, which training would pay for in speed (see `tune_allocator`).
    """
    if _on_glibc():
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _on_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


_DEVICE_FILES = {"/dev/nvidiactl": "gpu", "/dev/kfd": "gpu", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}


def accelerator() -> str | None:
    """`gpu`, `tpu` or another platform than the CPU, as a guess that needs no JAX: the one asked for, else that of the
    device files of NVIDIA, AMD and TPU drivers."""
    asked = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if asked:
        return None if asked == "cpu" else {"cuda": "gpu", "rocm": "gpu"}.get(asked, asked)
    return next((platform for file, platform in _DEVICE_FILES.items() if os.path.exists(file)), None)


def configure_jax(directory: str | None = None) -> None:
    """What every command sets before its first program: where programs are kept, and that they run in turn."""
    run_in_turn()
    enable_compile_cache(directory)


def run_in_turn() -> None:
    """On a CPU that is one device, a call of a program returns when it has run (on several, `group.run` waits for it).
    Call this before the first program.

    JAX would return at once, and take the next step's temporary memory while the last step still has its own: two or
    three blocks where one serves. There is no device that would stand idle meanwhile.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def enable_compile_cache(directory: str | None = None) -> None:
    """Keep compiled programs on disk, so that a restart does not compile again.

    `directory` defaults to `$XDG_CACHE_HOME/lmjax/xla` (`~/.cache/lmjax/xla`), one folder per kind of CPU: programs
    hold machine code, and home directories are shared. JAX's own variables JAX_COMPILATION_CACHE_DIR,
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS and JAX_ENABLE_COMPILATION_CACHE=false take precedence.
    """
    import jax

    if directory is None:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        directory = os.path.join(root, "lmjax", "xla", _cpu_kind())
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", directory)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _cpu_kind() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        described = "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        described = " ".join(os.uname())
    return hashlib.blake2b(described.encode(), digest_size=4).hexdigest()


def keep_to_owner() -> None:
    """What this process makes from here on only its owner can read, whatever it holds: directories are 0700, files
    0600. Others are given leave afterwards, `chmod -R g+rX`; a directory that is there already keeps its mode."""
    os.umask(0o077)


def cpu_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Versions, devices, XLA's flags and source revision, for reports and run records."""
    import importlib.metadata

    import jax

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "lmjax": importlib.metadata.version("lmjax"),
        "python": ".".join(map(str, sys.version_info[:3])),
        **{package: importlib.metadata.version(package) for package in packages},
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "cpu_cores": cpu_cores(),
        **{name: os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if name in os.environ},
        **git_revision(),
    }


def program() -> str:
    """`lmjax 0.1.0 (1a2b3c4d) on jax 0.10.2`: versions, and in parentheses a hash of lmjax's own source."""
    import importlib.metadata

    source = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(source.rglob("*.py")):
        digest.update(path.relative_to(source).as_posix().encode() + b"\0" + path.read_bytes())
    lmjax, jax = importlib.metadata.version("lmjax"), importlib.metadata.version("jax")
    return f"lmjax {lmjax} ({digest.hexdigest()}) on jax {jax}"


def git_revision() -> dict[str, Any]:
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
