"""Web archives: every page once, put together as a browser would, and damage named."""

import gzip
from pathlib import Path

import pytest
from etils import epath

from lmjax.data.config import PrepareConfig
from lmjax.data.curate.warc import read_warc
from lmjax.data.prepare.sources import Document, InputFile
from lmjax.errors import DataError

PAGE = "<html><body><p>Größe, naïve café</p></body></html>"


def record(kind: str, block: bytes, content_type: str, address: str = "http://a.example/x") -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {address}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def response(body: bytes, fields: str, status: str = "200 OK", address: str = "http://a.example/x") -> bytes:
    http = f"HTTP/1.1 {status}\r\n{fields}\r\n\r\n".encode() + body
    return record("response", http, "application/http; msgtype=response", address)


def chunked(body: bytes, size: int = 7) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


RECORDS: list[tuple[bytes, str | None]] = [
    (record("warcinfo", b"software: x\r\n", "application/warc-fields"), None),
    (record("request", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"), None),
    (response(PAGE.encode(), "Content-Type: text/html; charset=utf-8"), PAGE),
    (response(PAGE.encode("latin-1"), "Content-Type: text/html; charset=ISO-8859-1"), PAGE),
    (response(b"<meta charset='cp1252'>" + PAGE.encode("cp1252"), "Content-Type: text/html"),
     "<meta charset='cp1252'>" + PAGE),
    (response(b"\x89PNG" * 9, "Content-Type: image/png"), None),
    (response(PAGE.encode(), "Content-Type: text/html", "404 Not Found"), None),
    (response(chunked(gzip.compress(PAGE.encode())),
              "Content-Type: text/html; charset=utf-8\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip"), PAGE),
    (response(PAGE.encode(), "Content-Type: application/xhtml+xml\r\nContent-Encoding: gzip\r\nContent-Length: 9"),
     PAGE),
    (response(PAGE.encode(), "Content-Type: text/html; charset=martian"), PAGE),
    (record("conversion", PAGE.encode(), "text/plain"), PAGE),
]  # fmt: skip


def read(path: Path, content: bytes, most: int = 1 << 20) -> list[Document]:
    path.write_bytes(content)
    file = InputFile(epath.Path(path), path.name, len(content))
    return list(read_warc(file, PrepareConfig(document_bytes=most), lambda n_bytes: None))


def test_pages_and_texts_are_read(tmp_path: Path) -> None:
    expected = [text for _, text in RECORDS if text is not None]
    plain = read(tmp_path / "a.warc", b"".join(one for one, _ in RECORDS))
    assert [document.text for document in plain] == expected
    assert {document.name for document in plain} == {"a.warc, http://a.example/x"}
    packed = read(tmp_path / "a.warc.gz", b"".join(gzip.compress(one) for one, _ in RECORDS))
    assert [document.text for document in packed] == expected


@pytest.mark.parametrize("charset", ["undefined", "idna", "no-such", "base64"])
def test_a_charset_that_is_none_is_taken_for_utf_8(tmp_path: Path, charset: str) -> None:
    page = response(PAGE.encode(), f"Content-Type: text/html; charset={charset}")
    assert [document.text for document in read(tmp_path / "a.warc", page)] == [PAGE]


def test_what_cannot_be_decoded_is_no_text(tmp_path: Path) -> None:
    damaged = gzip.compress(PAGE.encode())[:20] + b"damage"
    blocks = [
        response(damaged, "Content-Type: text/html\r\nContent-Encoding: gzip"),
        response(PAGE.encode(), "Content-Type: text/html\r\nContent-Encoding: br"),
        record("response", b"nonsense", "application/http"),
    ]
    assert [document.text for document in read(tmp_path / "a.warc", b"".join(blocks))] == [None, None, None]


@pytest.mark.parametrize("number", [0, 2, 10])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, number: int) -> None:
    with pytest.raises(DataError, match="record 1: the file ends within it"):
        read(tmp_path / "a.warc", RECORDS[number][0][:-10])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "record 1: no WARC record"),
        (RECORDS[0][0] + b"more\r\n", "record 2: no WARC record"),
        (b"WARC/1.0\r\nWARC-Type: response\r\n\r\n", "does not say its length"),
        (b"WARC/1.0\r\nContent-Length: -5\r\n\r\n", "does not say its length"),
    ],
)
def test_what_is_no_warc_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.warc", content)


def test_what_grows_too_long_is_refused(tmp_path: Path) -> None:
    bomb = response(gzip.compress(b" " * 100_000), "Content-Type: text/html\r\nContent-Encoding: gzip")
    for content in (bomb, response(b"a" * 2000, "Content-Type: text/html")):
        with pytest.raises(DataError, match=r"longer than prepare.document_bytes=1,000"):
            read(tmp_path / "a.warc", content, most=1000)
    film = response(b"a" * 2000, "Content-Type: video/mp4")
    assert [document.text for document in read(tmp_path / "a.warc", film + RECORDS[2][0], most=1000)] == [PAGE]
