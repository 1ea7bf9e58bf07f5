"""A file in memory, read in place, that somebody may write to while it is read.

`np.memmap` holds a file descriptor for each file: more shards than descriptors would be an error. It looks at the file
once: a file that is cut off later ends the process with SIGBUS, one that is overwritten changes under the reader.
"""

import ctypes
import functools
import mmap
import os
import weakref
from typing import Any

import numpy as np
from etils import epath

from lmjax.errors import DataError
from lmjax.record import files


class Mapped:
    """The content of a file of known size as an array. Raises DataError when it is not there, or not of this size."""

    array: np.ndarray
    """The content, read only."""

    def __init__(self, path: epath.Path, dtype: np.dtype, length: int) -> None:
        self.path = path
        self._name = os.fspath(path)
        self._dtype, self._size = dtype, length * dtype.itemsize
        self._stamp: tuple[int, ...] | None = None
        self.renew()

    def renew(self) -> bool:
        """Whether somebody has written to the file since it was last looked at; then it is mapped anew.

        It costs a microsecond, for a look at size and times: where they are as they were, the content is.
        """
        with files.reporting(self.path):
            found = os.stat(self._name)
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if stamp == self._stamp:
            return False
        if found.st_size != self._size:
            raise DataError(
                f"{self.path} has {found.st_size} bytes instead of {self._size}: it was changed; restore it or prepare "
                "the data set again"
            )
        with files.reporting(self.path):
            self.array = _map(self._name, self._size).view(self._dtype)
        self._stamp = stamp
        return True


def _map(path: str, size: int) -> np.ndarray:
    """The bytes of a file. The descriptor is closed at once: the map lives without it. Raises OSError."""
    library = _libc()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    buffer: Any = (ctypes.c_ubyte * size).from_address(address)
    # Not at exit, when other threads may still read it.
    weakref.finalize(buffer, library.munmap, address, size).atexit = False
    array = np.frombuffer(buffer, np.uint8)
    array.flags.writeable = False
    return array


@functools.cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library
