"""Reading documents: every kind of file gives the same text, and what cannot be read is named."""

import gzip
import json
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lmjax.data.config import PrepareConfig
from lmjax.data.prepare.sources import list_inputs, read_documents
from lmjax.errors import DataError

TEXTS = ["first\r\nwith CRLF", "\ufeffsecond\0 with NUL", "", " \n ", "سلام\u200cدنیا", "𝔘 e\u0301 ▁", "x" * 3_000_000]


def read(pattern, **recipe):
    cfg = PrepareConfig(inputs=(str(pattern),), **recipe)
    return [document.text for document in read_documents(list_inputs(cfg.inputs), cfg, lambda n_bytes: None)]


def as_lines(texts):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "list json", "list json.gz", "parquet", "raw jsonl"]
)
def test_every_kind_of_file_gives_the_same_documents(tmp_path, kind):
    path = tmp_path / f"a.{kind.split()[-1]}"
    if kind == "parquet":
        pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=2)
    elif kind.startswith("list"):
        content = b"\n [" + json.dumps([{"text": text} for text in TEXTS], indent=1).encode()[1:]
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    elif kind == "raw jsonl":
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in TEXTS)
        path.write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\n")
    else:
        compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(kind.rpartition(".")[2], bytes)
        # Two members or frames, as parallel compressors write them.
        path.write_bytes(compress(as_lines(TEXTS[:3])) + compress(as_lines(TEXTS[3:])))
    assert read(path) == TEXTS


def test_a_file_of_json_may_be_blank_or_begin_with_a_mark(tmp_path):
    for name, content in (
        ("a", b""),
        ("b", b" \n\n"),
        ("c", b'\xef\xbb\xbf[{"text": "one"}]'),
        ("d", as_lines(["two"])),
    ):
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(content))
    assert read(tmp_path / "*.json.gz") == ["one", "two"]


def test_text_files_are_read_as_they_are(tmp_path):
    data = "\ufeffa\r\nb\0\n\nc\n"
    (tmp_path / "a.txt").write_bytes(data.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data.encode()))
    assert read(tmp_path / "*") == [data, data]
    assert read(tmp_path / "a.txt", document_separator="\n\n") == ["\ufeffa\r\nb\0", "c\n"]


def test_files_come_in_order_and_once(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a/3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = list_inputs((f"{tmp_path}/*/*.txt", f"{tmp_path}/b/*.txt", f"{tmp_path}/**/3.txt"))
    assert [file.path.read_text() for file in files] == ["a/3.txt", "b/1.txt", "b/2.txt"]


def test_standard_library_is_sorted_without_tests_or_duplicates():
    files = list_inputs(("stdlib:",))
    names = [file.name for file in files]
    assert names == sorted(names) and "stdlib:json/decoder.py" in names and len(names) > 300
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "idlelib", "lib2to3"))
    contents = [file.path.read_bytes() for file in files]
    assert len(set(contents)) == len(contents)
    assert list_inputs(("stdlib:",)) == files


INVALID = {  # six ways to be wrong: the byte that is reported, and what `replace` makes of it
    "cut off": (b"ab\xe2\x82", 2, "ab\ufffd"),
    "overlong": (b"a\xc0\xafb", 1, "a\ufffd\ufffdb"),
    "surrogate": (b"\xed\xa0\x80z", 0, "\ufffd\ufffd\ufffdz"),
    "continuation": (b"abc\x80", 3, "abc\ufffd"),
    "beyond": (b"\xf4\x90\x80\x80", 0, "\ufffd\ufffd\ufffd\ufffd"),
    "Latin-1": (b"caf\xe9", 3, "caf\ufffd"),
}


@pytest.mark.parametrize("kind", INVALID)
@pytest.mark.parametrize("compressed", [False, True])
def test_invalid_utf8_is_located_replaced_or_skipped(tmp_path, kind, compressed):
    data, offset, replaced = INVALID[kind]
    good = b'{"text": "good"}\n'
    content = good + b'{"text": "' + data + b'"}\n' + good
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}, line 2: .*at byte {len(good) + 10 + offset} "):
        read(path)
    assert read(path, invalid_utf8="replace") == ["good", replaced, "good"]
    assert read(path, invalid_utf8="skip") == ["good", None, "good"]


def test_invalid_utf8_in_text_and_parquet(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n--\ntwo\xff")
    with pytest.raises(DataError, match=r"a\.txt, document 2: invalid UTF-8 at byte 10 "):
        read(tmp_path / "a.txt", document_separator="\n--\n")
    array = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": array}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet, row 1: invalid UTF-8 at byte 3 "):
        read(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", invalid_utf8="skip") == ["fine", None]


def test_an_unpaired_surrogate_in_json_is_invalid_and_a_pair_is_not(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud835\udd18"}' + "\n" + r'{"text": "a\ud835b"}')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: unpaired surrogate U\+D835 at character 1"):
        read(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl", invalid_utf8="replace") == ["𝔘", "a\ufffdb"]
    assert read(tmp_path / "a.jsonl", invalid_utf8="skip") == ["𝔘", None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"line 2 \(byte 14\): not JSON"),
        ("[" * 100_000, r"line 2 \(byte 14\): not JSON"),
        ('["text"]', "no string under 'text' but list"),
        ('{"content": "a"}', r"no string under 'text' but an object with \['content'\]; set .*--text-key"),
        ('{"text": null}', "no string under 'text'"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value) and str(tmp_path / "a.jsonl") in str(caught.value)


def test_other_text_keys(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "a"}')
    assert read(tmp_path / "a.jsonl", text_key="content") == ["a"]
    pq.write_table(pa.table({"content": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text' among"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 1: null under 'content'"):
        read(tmp_path / "a.parquet", text_key="content")


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "txt.gz", "parquet"])
def test_a_damaged_compressed_file_is_never_taken_for_a_shorter_one(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    texts = [f"document {number} {random.Random(number).random()}" for number in range(2000)]
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_bytes((zstandard.compress if kind.endswith("zst") else gzip.compress)(as_lines(texts)))
    whole = path.read_bytes()
    expected = read(path)
    assert len(expected) == (1 if kind == "txt.gz" else 2000)
    for size in (len(whole) - 1, len(whole) // 2, 10, 0):
        path.write_bytes(whole[:size])
        try:
            found = read(path)
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert size == 0 and "".join(found) == ""
    for seed in range(40):
        damaged = bytearray(whole)
        where = random.Random(seed).randrange(len(whole))
        damaged[where] ^= 1 << seed % 8
        path.write_bytes(damaged)
        try:
            found = read(path)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert found == expected or kind in ("parquet", "jsonl.zst")  # formats without a checksum of the content


def test_missing_inputs_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no input files for '.*/\*\.jsonl': nothing matches"):
        read(tmp_path / "*.jsonl")
    with pytest.raises(DataError, match="nothing matches"):
        read(tmp_path / "absent" / "*.jsonl")
    with pytest.raises(DataError, match=r"no input files in .* and its folders; known kinds are \.txt"):
        read(tmp_path)
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(DataError, match=r"a\.doc: unknown kind of input; known are \.txt"):
        read(tmp_path / "a.doc")


def test_a_folder_is_all_the_text_in_it(tmp_path, caplog):
    for name in ("b.txt", "a/z.txt", "a/y.jsonl", "a/notes.md", "a/LICENSE", ".git/c.txt", ".d.txt", "e.txt/f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert read(tmp_path) == ["a/y.jsonl", "a/z.txt", "b.txt", "e.txt/f.txt"]
    assert "files of other kinds are left out: 2 (.md, LICENSE)" in caplog.text
    assert "links" not in caplog.text
    (tmp_path / "more").symlink_to("a")
    assert read(tmp_path) == ["a/y.jsonl", "a/z.txt", "b.txt", "e.txt/f.txt"]
    assert "links to folders are not followed, name them: 1 (more)" in caplog.text
    assert read(tmp_path / "a") == ["a/y.jsonl", "a/z.txt"]


def test_buckets_without_their_extra(tmp_path):
    with pytest.raises(DataError, match=r"cannot read s3://bucket.*install lmjax\[aws\]"):
        read("s3://bucket/*.txt")
    with pytest.raises(DataError, match=r"cannot read gs://bucket.*install lmjax\[gcp\]"):
        read("gs://bucket/a.txt")
