"""Files as chunks of bytes, decompressed on the way."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from etils import epath

from lmjax.errors import DataError

_CHUNK_BYTES = 1 << 20
_ZSTD_BYTES = 1 << 12  # compressed, at a time: they may hold 32,768 times as much

Report = Callable[[int], None]
"""Called with each number of bytes read from disk."""


def chunks(path: epath.Path, name: str, report: Report) -> Iterator[bytes]:
    """A file's content, decompressed as its name says, in chunks.

    Raises DataError, by the name, if the compressed stream is damaged or cut.
    """
    with path.open("rb") as raw:
        if name.endswith(".gz"):
            yield from _gunzip(name, raw, report)
        elif name.endswith(".zst"):
            yield from _unzstd(name, raw, report)
        else:
            yield from _raw_chunks(raw, report)


def _raw_chunks(raw: BinaryIO, report: Report) -> Iterator[bytes]:
    while chunk := raw.read(_CHUNK_BYTES):
        report(len(chunk))
        yield chunk


def _gunzip(name: str, raw: BinaryIO, report: Report) -> Iterator[bytes]:
    position = 0
    try:
        with gzip.GzipFile(fileobj=raw) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                report(raw.tell() - position)
                position = raw.tell()
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}: damaged gzip file: {error}; fetch it again") from error


def _unzstd(name: str, raw: BinaryIO, report: Report) -> Iterator[bytes]:
    import zstandard

    # Not stream_reader: it takes a file that was cut off for a complete one.
    unpacker: Any = None
    try:
        for chunk in _raw_chunks(raw, report):
            for low in range(0, len(chunk), _ZSTD_BYTES):
                rest = chunk[low : low + _ZSTD_BYTES]
                while rest:
                    unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
                    yield unpacker.decompress(rest)
                    rest = unpacker.unused_data
                    if unpacker.eof:
                        unpacker = None
    except zstandard.ZstdError as error:
        raise DataError(f"{name}: damaged zstd file: {error}; fetch it again") from error
    if unpacker is not None:
        raise DataError(f"{name}: damaged zstd file: it ends within a frame; fetch it again")
