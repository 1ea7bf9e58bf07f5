"""gs:// as buckets.py wants it."""

import functools
import io
import json
import logging
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp
from fsspec.asyn import sync_wrapper
from gcsfs.core import GCSFileSystem  # gcsfs's own choice asks for each bucket's kind, by an API with other rights

from lmjax.record.buckets import SETTINGS, insist, or_nothing

_SILENCE = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
"""How many seconds the server may say nothing; what goes on may take any time."""

_once = getattr(GCSFileSystem._request, "__wrapped__", GCSFileSystem._request)
"""A request without gcsfs's own tries, which are few, and the first of which waits for more than a second."""


class Bucket(GCSFileSystem):
    """Raises StorageError where the store, not what it answers, is the trouble."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**SETTINGS | {"requests_timeout": _SILENCE} | settings)
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises

    async def _request(self, *args: Any, **words: Any) -> Any:
        return await _once(self, *args, **words)

    def _open(self, path: str, mode: str = "rb", *args: Any, **words: Any) -> Any:
        return (
            _Whole(functools.partial(self.pipe_file, path))
            if mode == "wb"
            else super()._open(path, mode, *args, **words)
        )

    async def _ls(self, path: str, detail: bool = False, **words: Any) -> Any:
        return await or_nothing(super()._ls(path, detail=detail, **words))

    async def _call(self, method: str, path: str, *args: Any, **words: Any) -> Any:
        request = super()._call
        try:
            return await insist(_name(path, args, words), lambda: request(method, path, *args, **words))
        except FileNotFoundError:
            if method != "DELETE":
                raise
            return {}, b""  # gone, as was asked: perhaps by a request whose reply was lost

    call = sync_wrapper(_call)  # which files upload by


class _Whole(io.BytesIO):
    """A file that is put into the bucket when it is closed, in one request up to 50 MB, unless an error ends it.

    gcsfs takes two, of which the second cannot be made again where the reply to it was lost.
    """

    def __init__(self, put: Callable[[bytes], object]) -> None:
        super().__init__()
        self._put = put

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._put(content)

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            super().close()
        self.close()


def _name(path: str, args: tuple[Any, ...], words: dict[str, Any]) -> str:
    """The object that a request is about."""
    if args:  # of a template: bucket, then object
        return "gs://" + "/".join(filter(None, (*map(str, args), words.get("prefix"))))
    bucket, _, name = urlsplit(path).path.partition("/b/")[2].partition("/o")
    if not name:
        name = urlsplit(path).query.partition("name=")[2].partition("&")[0]
    if not name and (found := re.search(rb"\n\n(\{.*\})\n--", bytes(words.get("data") or b"")[:4096])):
        name = json.loads(found[1])["name"]
    return f"gs://{bucket}/{unquote(name).lstrip('/')}"
