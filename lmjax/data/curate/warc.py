"""Web archives: the pages and texts of WARC files (ISO 28500), such as those of Common Crawl.

Of the records, responses that are HTML become documents, and so does plain text that was extracted from pages (WET
files). A page keeps its HTML, for the step `extract`. What is sent in chunks or compressed is put together again.
"""

import http.client
import io
import re
import zlib
from collections.abc import Iterator
from email.message import Message
from typing import Any, BinaryIO

from lmjax.data.config import PrepareConfig
from lmjax.data.prepare import decompress
from lmjax.data.prepare.sources import Document, InputFile, Report, check_length
from lmjax.errors import DataError

_SKIPPED = 1 << 20  # bytes, at a time
_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)


def read_warc(file: InputFile, cfg: PrepareConfig, report: Report) -> Iterator[Document]:
    """The documents of a WARC file, named by their addresses; those that cannot be decoded have no text.

    Raises DataError for what is no WARC, or ends within a record.
    """
    stream = io.BufferedReader(_Raw(decompress.chunks(file.path, file.name, report)))
    number = 0
    while first := stream.readline():
        if not first.strip():
            continue
        number += 1
        where = f"{file.name}, record {number}"
        if not first.startswith(b"WARC/"):
            raise DataError(f"{where}: no WARC record, which begins with WARC/1.0 or the like; is the file damaged?")
        head, length = _head(stream, where)
        kind = head.get("WARC-Type", "")
        if not _may_be_document(kind, head.get_content_type()):
            _skip(stream, length, where)
            continue
        block = stream.read(min(length, cfg.document_bytes))
        _skip(stream, length - len(block), where)
        name = f"{file.name}, {head.get('WARC-Target-URI') or f'record {number}'}"
        if kind == "conversion":
            check_length(length, cfg.document_bytes, name)
            yield Document(name, block.decode("utf-8", "replace"))
        else:
            yield from _page(name, block, length, cfg.document_bytes)


class _Raw(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _head(stream: BinaryIO, where: str) -> tuple[Message, int]:
    """The record's fields, and the length of its block."""
    try:
        head = http.client.parse_headers(stream)
        length = int(head.get("Content-Length", ""))
        if length < 0:
            raise ValueError
    except (http.client.HTTPException, ValueError) as error:
        raise DataError(f"{where}: it does not say its length; is the file damaged?") from error
    return head, length


def _may_be_document(kind: str, content_type: str) -> bool:
    return (kind, content_type) in (("response", "application/http"), ("conversion", "text/plain"))


def _skip(stream: BinaryIO, length: int, where: str) -> None:
    while length > 0:
        skipped = len(stream.read(min(length, _SKIPPED)))
        if not skipped:
            raise DataError(f"{where}: the file ends within it; fetch it again")
        length -= skipped


class _Connection:
    """What was received, for `http.client`."""

    def __init__(self, block: bytes):
        self._block = block

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._block)


def _page(name: str, block: bytes, length: int, most: int) -> Iterator[Document]:
    """The page of an HTTP response, if it is one. Raises DataError for a page of more than `most` bytes."""
    response = http.client.HTTPResponse(_Connection(block))  # type: ignore[arg-type]
    try:
        response.begin()
        if response.status != 200 or response.headers.get_content_type() not in _HTML:
            return
        check_length(length, most, name)
        body = response.read() if response.chunked else response.fp.read()  # its Content-Length may be of another form
        body = _decompressed(body, response.headers.get("Content-Encoding", "identity").lower(), most)
    except DataError:
        raise
    except (http.client.HTTPException, zlib.error, ValueError):
        yield Document(name, None)
        return
    check_length(len(body), most, name)
    found = _CHARSET.search(body[:4096])
    charset = response.headers.get_content_charset() or (found[1].decode("ascii") if found else "utf-8")
    try:
        text = body.decode(charset, "replace")
    except (LookupError, ValueError):  # what Python knows as no charset, or as one that takes no pages, such as idna
        text = body.decode("utf-8", "replace")
    yield Document(name, text.encode("utf-8", "replace").decode("utf-8"))


_HTML = ("text/html", "application/xhtml+xml")


def _decompressed(body: bytes, encoding: str, most: int) -> bytes:
    """Raises ValueError for an encoding that is not known, zlib.error for a body that is damaged."""
    if encoding in ("identity", ""):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(encoding)
    if body[:2] != b"\x1f\x8b" and encoding != "deflate":
        return body  # archives keep the header of what they have decompressed
    unpacker = zlib.decompressobj(wbits=47)
    content = unpacker.decompress(body, most + 1)
    if len(content) <= most and not unpacker.eof:
        raise ValueError("it is cut off")
    return content
