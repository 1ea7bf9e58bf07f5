"""File systems of buckets, in which what fails is never taken for what is not there.

gcsfs and s3fs raise whatever the network raised, after a few tries. Some of that is an OSError, for which fsspec's
`isdir` says "no directory" and our own readers say "damaged": a store that is down would look like an empty one, and a
run would start from step 0. Here it becomes a StorageError. Nor is a listing ever kept: other processes, and
TensorStore in this one, write there, too.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

import fsspec

from lmjax.errors import StorageError, one_line

logger = logging.getLogger(__name__)

_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""What a store says of an object, not of itself."""
_TRIES = 10
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 16.0
"""Seconds; each is twice the one before, so that all of them together take most of a minute."""
_PASSING = {401, 408, 429}
"""Of the answers that blame the request, those that another time may not come: 401 as a token expires."""

SETTINGS = {"use_listings_cache": False}
"""What both packages are told."""


def register() -> None:
    """Have every path in a bucket, also those of Orbax, go through these file systems; before the first is used."""
    for schemes, module, package in ((("gs", "gcs"), "google_bucket", "gcsfs"), (("s3",), "amazon_bucket", "s3fs")):
        for scheme in schemes:
            fsspec.register_implementation(
                scheme, f"lmjax.record.{module}.Bucket", clobber=True, errtxt=f"{scheme}:// needs {package}"
            )


async def insist(name: str, request: Callable[[], Awaitable[Any]]) -> Any:
    """What the request gives, or the answer that it raises. Raises StorageError when it fails again and again."""
    for tried in range(1, _TRIES + 1):
        try:
            return await request()
        except _ANSWERS:
            raise
        except Exception as error:
            reason = one_line(error, 200)
            if tried == _TRIES or _is_refused(error):
                raise StorageError(
                    f"storage: {name}: {reason} (try {tried}); mend the bucket, or the way to it, and run again"
                ) from error
            if tried == _TRIES // 2:
                logger.warning("storage: %s: %s; still trying", name, reason)
            await asyncio.sleep(min(_FIRST_WAIT * 2 ** (tried - 1), _LONGEST_WAIT) * (0.5 + random.random()))
    raise AssertionError


def _is_refused(error: Exception) -> bool:
    """Whether the store has understood, and will not."""
    code = str(getattr(error, "code", ""))
    said = isinstance(error, PermissionError) or str(error).startswith(("Forbidden", "Bad Request"))
    return said or (code.startswith("4") and int(code) not in _PASSING)


async def or_nothing(listing: Awaitable[Any]) -> Any:
    """What a listing gives; nothing of a directory that is not there: to make one leaves nothing in a bucket."""
    try:
        return await listing
    except FileNotFoundError:
        return []
