"""Files, local or in a bucket: located, written whole or not at all, hashed, locked, staged to local disk."""

import contextlib
import errno
import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import BinaryIO

import fsspec
from etils import epath

from lmjax.errors import ConfigError, DataError

_EXTRAS = {"gs": "gcp", "s3": "aws"}
DIGEST_BYTES = 32
_BLOCK_BYTES = 1 << 22
_FULL = {errno.ENOSPC, errno.EDQUOT}


def locate(path: str | os.PathLike[str]) -> epath.Path:
    """`path` with ~ expanded; DataError if it is empty, or in a bucket whose package is not installed."""
    if not os.fspath(path):
        raise DataError("a path is empty; name a file or a directory (is a variable of the shell unset?)")
    scheme, mark, _ = os.fspath(path).partition("://")
    if mark and scheme not in _EXTRAS:
        raise DataError(
            f"cannot read {os.fspath(path)}: known are local paths, {', '.join(f'{x}://' for x in _EXTRAS)}"
        )
    located = epath.Path(path).expanduser()
    if is_remote(located):
        with reporting(located):
            located.exists()
    return located


def check_takes_checkpoints(path: str | os.PathLike[str], flag: str) -> None:
    """Raise ConfigError for a bucket that Orbax takes for a relative path, though TensorStore knows it."""
    if os.fspath(path).startswith("s3://"):
        raise ConfigError(
            f"{flag}={os.fspath(path)}: Orbax writes checkpoints to disks and gs://, not to s3://, where only data may "
            "be; use a disk that all machines share"
        )


def is_remote(path: epath.Path) -> bool:
    """Whether `path` is in a bucket."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """`path` from the root on; one in a bucket is (epath would put it below the current directory)."""
    return epath.Path(path) if is_remote(epath.Path(path)) else epath.Path(path).resolve()


@contextlib.contextmanager
def reporting(path: os.PathLike[str], doing: str = "read") -> Iterator[None]:
    """Turns a failure of the storage into a DataError that names the file."""
    try:
        yield
    except ImportError as error:
        scheme = os.fspath(path).partition("://")[0]
        raise DataError(
            f"cannot {doing} {os.fspath(path)}: install lmjax[{_EXTRAS.get(scheme, scheme)}] for {scheme}:// paths"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot {doing} {os.fspath(path)}: {reason}") from error


def read_bytes(path: epath.Path) -> bytes:
    """The file's content; DataError if it cannot be read."""
    with reporting(path):
        return path.read_bytes()


def write_bytes(path: epath.Path, *parts: bytes | memoryview) -> None:
    """`write_atomically`; DataError if that fails."""
    with reporting(path, "write"):
        write_atomically(path, *parts)


def write_atomically(path: epath.Path, *parts: str | bytes | memoryview) -> None:
    """Write the parts so that `path` either holds all of them, on disk, or is as before. Raises OSError."""
    content = [part.encode() if isinstance(part, str) else part for part in parts]
    if is_remote(path):  # an object store does that for every object
        path.write_bytes(b"".join(content))
        return
    with naming(path, sum(memoryview(part).nbytes for part in content)):
        with drafted(path) as file:
            file.writelines(content)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # which holds the new name
        finally:
            os.close(directory)


@contextlib.contextmanager
def drafted(path: epath.Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the body ends well, and goes when it does not. Raises OSError.

    What lies at the draft's own name is a draft that a kill left, and gives way; somebody's symbolic link is refused:
    to write would be to write over what it points to.
    """
    if is_remote(path):
        with tempfile.NamedTemporaryFile() as here:
            with open(here.name, "wb") as file:
                yield file
            system, name = fsspec.url_to_fs(os.fspath(path))
            system.put_file(here.name, name)
        return
    draft = path.parent / (path.name + ".tmp")
    if os.path.islink(draft):
        raise OSError(errno.ELOOP, "a symbolic link stands where this is to be written; remove it", os.fspath(draft))
    draft.unlink(missing_ok=True)
    try:
        with new_file(draft) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)  # a draft would keep a full disk full
        raise


def new_file(path: epath.Path) -> BinaryIO:
    """A file that was not there, to be written: nothing that has the name is written over, nor is a link followed."""
    return open(path, "xb")


@contextlib.contextmanager
def naming(path: os.PathLike[str], size: int) -> Iterator[None]:
    """An OSError of the writing of `size` bytes to `path` says so."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        described = f"{error.strerror}{room(error, path, size)}"
        raise OSError(error.errno, described, error.filename or os.fspath(path)) from error


def room(error: OSError, path: os.PathLike[str], size: int) -> str:
    """What is needed and what is there, in parentheses, where the error is that there is not enough."""
    if error.errno not in _FULL:
        return ""
    return f" (needs {in_words(size)}, {in_words(shutil.disk_usage(epath.Path(path).parent).free)} free)"


def in_words(size: int) -> str:
    """Bytes as people read them: `516 bytes`, `5.2 kB`, `1.2 GB`."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def hash_bytes(*parts: bytes | memoryview, digest_size: int = DIGEST_BYTES) -> str:
    """BLAKE2b of the parts one after the other, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=digest_size)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def hash_file(path: epath.Path, copy_to: BinaryIO | None = None) -> str:
    """`hash_bytes` of a file's content, copied on the way if wished; DataError if it cannot be read."""
    with reporting(path):
        return hash_and_size(path, copy_to)[0]


def hash_and_size(
    path: epath.Path, copy_to: BinaryIO | None = None, *, digest_size: int = DIGEST_BYTES
) -> tuple[str, int]:
    """`hash_bytes` of a file's content, read block by block, and its length. Raises OSError if it cannot be read."""
    digest, size = hashlib.blake2b(digest_size=digest_size), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            if copy_to is not None:
                copy_to.write(block)
    return digest.hexdigest(), size


def fetch(source: epath.Path, target: epath.Path, expected_hash: str) -> None:
    """Copy a file to local disk, hashed on the way. Raises DataError if the content does not have the expected hash."""
    with reporting(source):
        size = source.stat().length
    with reporting(target, "write"), naming(target, size), drafted(target) as file:
        if hash_file(source, copy_to=file) != expected_hash:
            raise DataError(f"{source} is damaged: its hash is not the manifest's; prepare the data set again")


def copy_in_bucket(source: epath.Path, target: epath.Path) -> None:
    """Copy an object, or all below a name, within a store, which sends nothing here."""
    system, below = fsspec.url_to_fs(os.fspath(source))
    for name in system.find(below):
        system.cp_file(name, system._strip_protocol(os.fspath(target)) + name.removeprefix(below))


def stamp(path: epath.Path) -> str:
    """A file's size and times: as long as they are the same, nobody has written to it."""
    with reporting(path):
        if is_remote(path):
            found = path.stat()
            return f"{found.length} {found.mtime}"
        local = os.stat(path)
        return f"{local.st_size} {local.st_mtime_ns} {local.st_ctime_ns}"


def has_size(path: epath.Path, size: int) -> bool:
    """Whether `path` exists with `size` bytes."""
    return path.exists() and path.stat().length == size


def require_space(directory: epath.Path, needed: int) -> None:
    """DataError unless the disk that holds `directory` has `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DataError(
            f"{directory} has {in_words(free)} free but staging needs {in_words(needed)}; "
            "free some space or point data.cache to another disk"
        )


@contextlib.contextmanager
def locked(directory: epath.Path) -> Iterator[None]:
    """Keeps other processes out of `directory`, as `lock` does; DataError if nothing can be written there."""
    with contextlib.ExitStack() as stack:
        with reporting(directory, "write"):
            stack.enter_context(lock(directory / "lock"))
        yield


@contextlib.contextmanager
def lock(path: epath.Path, patience: float = math.inf, notice: str | None = None) -> Iterator[bool]:
    """Holds the lock of the file `path`, which is made; a process that dies lets go.

    Gives whether it is held: not if another process still has it after `patience` seconds. `notice` is printed before
    the wait. Buckets, and file systems without locks, keep nobody out: there two writers at once are the caller's to
    avoid. Raises OSError when the file cannot be made.
    """
    if is_remote(path):
        yield True
        return
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # a file of this name may be somebody's
    with open(os.open(path, flags, 0o666), "ab") as file:
        yield _acquired(file, patience, notice)


def _acquired(file: BinaryIO, patience: float, notice: str | None) -> bool:
    import fcntl

    deadline = None
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by a forked child
        except (BlockingIOError, PermissionError):
            if deadline is None:
                deadline = time.monotonic() + patience
                if notice is not None:
                    print(notice, flush=True)
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return True
        else:
            return True
