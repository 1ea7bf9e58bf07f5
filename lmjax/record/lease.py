"""Leave to write: a word in the work directory that the processes of an attempt know, and look for before they write.

A process may be stopped for hours, given up by the others, and then go on as if nothing had been. Whoever gives up
takes the word away, and a later attempt puts another in its place: who comes back finds that, and writes no more.
"""

import os
import time

from etils import epath

from lmjax.errors import StallError, StorageError
from lmjax.process import group
from lmjax.record import files

FILE = ".lease"
_SECONDS = {False: 1.0, True: 30.0}
"""How long leave is good for, on a disk and in a bucket, where to look costs more."""


class Lease:
    """Made by all processes of an attempt together, once the work directory is theirs. Raises OSError."""

    def __init__(self, workdir: epath.Path) -> None:
        self._path = workdir / FILE
        self._word = group.broadcast("the word of this attempt", os.urandom(8).hex())
        if group.is_leader():
            files.write_atomically(self._path, self._word)
        group.barrier("the lease")
        self._checked = time.monotonic()

    def check(self) -> None:
        """Raise StallError if this attempt has been given up. Costs a look at the file, now and then."""
        if time.monotonic() - self._checked < _SECONDS[files.is_remote(self._path)]:
            return
        if not self._holds():
            raise StallError(
                f"the others gave this process up while it stood still, or another attempt has begun ({self._path}): "
                "nothing more is written here; run again to go on from the last checkpoint"
            )
        self._checked = time.monotonic()

    def revoke(self) -> None:
        """This attempt is given up: who of it comes back must not write. Never raises."""
        try:
            if self._holds():
                self._path.unlink()
        except (OSError, StorageError):
            pass  # then there is nothing to be written to, either

    def _holds(self) -> bool:
        try:
            return self._path.read_text() == self._word
        except FileNotFoundError:
            return False
