"""Documents out of files: .txt, JSON lines and lists, Parquet, compressed or not, as streams, strict about UTF-8."""

import hashlib
import json
import logging
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from lmjax.data.config import PrepareConfig
from lmjax.data.prepare import decompress
from lmjax.data.prepare.decompress import Report
from lmjax.errors import DataError
from lmjax.record.files import hash_bytes, hash_file, is_remote, locate, reporting, stamp

logger = logging.getLogger(__name__)

STDLIB = "stdlib:"
SET_TEXT_KEY = "set prepare.text_key (lmjax prepare: --text-key)"
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


class InputFile(NamedTuple):
    """A file to read."""

    path: epath.Path
    name: str
    """What errors and the recipe call it."""
    size: int
    """Bytes on disk."""


class Document(NamedTuple):
    """A text and where it came from."""

    name: str
    text: str | None
    """None where it is not valid UTF-8 and the recipe says to skip such documents."""


# Which files ----------------------------------------------------------------------------------------------------------


def list_inputs(patterns: Sequence[str], readers: "Readers | None" = None) -> tuple[InputFile, ...]:
    """The files that the patterns match, each once, sorted within a pattern; of a folder all that are text.

    Raises DataError for a pattern that matches no file and for a file of no known kind.
    """
    files = {file.name: file for pattern in patterns for file in _matching(pattern, readers or READERS)}
    return tuple(files.values())


def contents(files: Sequence[InputFile]) -> str:
    """A hash of what the files hold. Of those in buckets, which are not read for it, of their sizes and times."""
    read = (stamp if is_remote(file.path) else hash_file for file in files)
    return hash_bytes("\n".join(of(file.path) for of, file in zip(read, files, strict=True)).encode())


def stamps(files: Sequence[InputFile]) -> str:
    """A hash of the files' sizes and times: as long as it is the same, nobody has touched them."""
    return hash_bytes("\n".join(stamp(file.path) for file in files).encode())


def _matching(pattern: str, readers: "Readers") -> list[InputFile]:
    if pattern == STDLIB:
        return _standard_library(Path(sysconfig.get_paths()["stdlib"]))
    path = locate(pattern)
    with reporting(path):
        if path.is_dir() and not is_remote(path):
            return _below(Path(path), readers)
        try:
            found = [path] if path.exists() else sorted(_glob(pattern))
        except ValueError as error:
            raise DataError(f"{pattern!r} is not a glob: {error}") from error
        files = [InputFile(path, os.fspath(path), path.stat().length) for path in found if not path.is_dir()]
    if not files:
        hint = "a directory: add a glob such as /*.txt" if found else "nothing matches"
        raise DataError(f"no input files for {pattern!r}: {hint} (working directory {os.getcwd()})")
    for file in files:
        _reader(file, readers)
    return files


def _below(folder: Path, readers: "Readers") -> list[InputFile]:
    """The files of known kinds in a folder and its folders, but for hidden ones. Says what else there is."""
    paths = [path for path in sorted(folder.rglob("*")) if not _hidden(path.relative_to(folder))]
    if links := [path.name for path in paths if path.is_symlink() and path.is_dir()]:
        logger.warning("%s: links to folders are not followed, name them: %d (%s)", folder, len(links), links[0])
    shown = [path for path in paths if path.is_file()]
    # Most .json files hold settings: one is read where it is named.
    known = [path for path in shown if _kind(path.name, readers) and path.suffix != ".json"]
    if not known:
        raise DataError(f"no input files in {folder} and its folders; known kinds are {', '.join(readers)}")
    others = [path.suffix or path.name for path in shown if path not in known and path.name not in _OF_CURATION]
    if others:
        kinds = ", ".join(sorted(set(others))[:8])
        logger.warning("%s: files of other kinds are left out: %d (%s)", folder, len(others), kinds)
    return [InputFile(epath.Path(path), os.fspath(path), path.stat().st_size) for path in known]


_OF_CURATION = ("curation.json", "curation.html")  # what `lmjax curate` writes beside its documents


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _glob(pattern: str) -> Iterator[epath.Path]:
    """The paths that match: from the last folder without a wildcard, the rest of the pattern below it."""
    wildcard = re.search(r"[*?\[]", pattern)
    if wildcard is None:
        return iter(())
    head, slash, _ = pattern[: wildcard.start()].rpartition("/")
    root, rest = locate(head or slash or "."), pattern[len(head) + len(slash) :]
    if is_remote(root):
        if "**" in rest:
            raise DataError(f"{pattern}: ** is for local files only, since it would list the whole bucket; use *")
        return root.glob(rest)
    return map(epath.Path, Path(root).glob(rest))  # epath's own has no **


def _standard_library(root: Path) -> list[InputFile]:
    """The .py files of the standard library without its tests and without exact duplicates, sorted by path."""
    seen: set[bytes] = set()
    files = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _STDLIB_LEFT_OUT & set(inside.parts):
            continue
        digest = hashlib.blake2b(path.read_bytes()).digest()
        if digest not in seen:
            seen.add(digest)
            files.append(InputFile(epath.Path(path), STDLIB + inside.as_posix(), path.stat().st_size))
    return files


# From files to documents ----------------------------------------------------------------------------------------------


def read_documents(
    files: Sequence[InputFile], cfg: PrepareConfig, report: Report, readers: "Readers | None" = None
) -> Iterator[Document]:
    """Every document of the files, in order.

    Raises DataError, naming file and place, for what cannot be read, is not JSON, or lacks the text field, and for
    invalid UTF-8 unless the recipe replaces or skips it.
    """
    for file in files:
        with reporting(file.path):
            yield from _reader(file, readers or READERS)(file, cfg, report)


Reader = Callable[[InputFile, PrepareConfig, Report], Iterator[Document]]
Readers = Mapping[str, Reader]
"""By the end of the file's name."""


def _reader(file: InputFile, readers: Readers) -> Reader:
    if (reader := _kind(file.name, readers)) is None:
        raise DataError(f"{file.name}: unknown kind of input; known are {', '.join(readers)}")
    return reader


def _kind(name: str, readers: Readers) -> Reader | None:
    return next((reader for suffix, reader in readers.items() if name.endswith(suffix)), None)


def read_text(file: InputFile, cfg: PrepareConfig, report: Report) -> Iterator[Document]:
    separator = cfg.document_separator
    if separator is None:
        (data,) = _parts(_chunks(file, report), None, lambda number: file.name, cfg.document_bytes)
        yield _document(file.name, data, 0, cfg)
        return
    mark = separator.encode("utf-8", "surrogateescape")  # the command line may give any bytes
    offset = 0
    parts = _parts(_chunks(file, report), mark, lambda number: f"{file.name}, document {number}", cfg.document_bytes)
    for number, part in enumerate(parts, 1):
        yield _document(f"{file.name}, document {number}", part, offset, cfg)
        offset += len(part) + len(mark)


def _read_json_lines(file: InputFile, cfg: PrepareConfig, report: Report) -> Iterator[Document]:
    for name, line, offset in _lines(file, cfg, report):
        yield _json_document(name, line, offset, cfg)


def read_records(files: Sequence[InputFile], cfg: PrepareConfig) -> Iterator[Any]:
    """The value of each line of files of JSON lines. Raises DataError, naming file and place, for what is not JSON."""
    for file in files:
        for name, line, offset in _lines(file, cfg, lambda n_bytes: None):
            yield _parsed(name, line, offset)


def _lines(file: InputFile, cfg: PrepareConfig, report: Report) -> Iterator[tuple[str, bytes, int]]:
    """(name, content, byte of the file) of each line that is not blank."""
    offset = 0
    lines = _parts(_chunks(file, report), b"\n", lambda number: f"{file.name}, line {number}", cfg.document_bytes)
    for number, line in enumerate(lines, 1):
        if content := (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
            yield f"{file.name}, line {number}", content, offset
        offset += len(line) + 1


def _parsed(name: str, line: bytes | str, offset: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name} (byte {offset}): not JSON: {error}; each line must be one JSON object, or a .json file a list"
        ) from error


def _json_document(name: str, line: bytes, offset: int, cfg: PrepareConfig) -> Document:
    decoded = _document(name, line, offset, cfg)
    if decoded.text is None or cfg.chat is not None:  # who encodes a conversation reads its JSON
        return decoded
    record = _parsed(name, decoded.text, offset)
    return _well_formed(name, _text_of(f"{name} (byte {offset})", record, cfg), cfg)


def _text_of(where: str, record: Any, cfg: PrepareConfig) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(cfg.text_key), str):
        found = f"an object with {sorted(record)[:8]}" if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: no string under {cfg.text_key!r} but {found}; {SET_TEXT_KEY}")
    return record[cfg.text_key]


def _read_json(file: InputFile, cfg: PrepareConfig, report: Report) -> Iterator[Document]:
    """A list of objects, or an object a line, as C4 has them: its first sign tells."""
    starts = (chunk.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] for chunk in _chunks(file, lambda n_bytes: None))
    first = next(filter(None, starts), b"")
    yield from (_read_json_list if first == b"[" else _read_json_lines)(file, cfg, report)


def _read_json_list(file: InputFile, cfg: PrepareConfig, report: Report) -> Iterator[Document]:
    (data,) = _parts(_chunks(file, report), None, lambda number: file.name, cfg.document_bytes)
    text = _document(file.name, data.removeprefix(b"\xef\xbb\xbf"), 0, cfg).text
    if text is None:
        yield Document(file.name, None)
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name}: not JSON: {error}; it must be a list of objects") from error
    if not isinstance(records, list):
        raise DataError(f"{file.name}: no list but {type(records).__name__}; it must be a list of objects")
    for number, record in enumerate(records, 1):
        name = f"{file.name}, item {number}"
        if cfg.chat is not None:
            yield Document(name, json.dumps(record))
        else:
            yield _well_formed(name, _text_of(name, record, cfg), cfg)


def _read_parquet(file: InputFile, cfg: PrepareConfig, report: Report) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{file.name}: Parquet files need an extra, install lmjax[data]") from error

    row = 0
    try:
        with file.path.open("rb") as stream:
            table = pyarrow.parquet.ParquetFile(stream)
            if cfg.text_key not in table.schema_arrow.names:
                names = table.schema_arrow.names[:8]
                raise DataError(f"{file.name}: no column {cfg.text_key!r} among {names}; {SET_TEXT_KEY}")
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(1024, row_groups=[group], columns=[cfg.text_key]):
                    for value in batch.column(0).cast(pyarrow.large_binary()):
                        yield _parquet_document(f"{file.name}, row {row}", value.as_py(), cfg)
                        row += 1
                report(file.size // table.num_row_groups)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file.name}: not a readable Parquet file with text at row {row}: {reason}") from error


def _parquet_document(name: str, value: bytes | None, cfg: PrepareConfig) -> Document:
    if value is None:
        raise DataError(f"{name}: null under {cfg.text_key!r}; remove such rows or {SET_TEXT_KEY}")
    check_length(len(value), cfg.document_bytes, name)
    return _document(name, value, 0, cfg)


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".txt.gz": read_text,
    ".py": read_text,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".jsonl.zst": _read_json_lines,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".parquet": _read_parquet,
}


# Bytes to text --------------------------------------------------------------------------------------------------------


def _document(name: str, data: bytes, offset: int, cfg: PrepareConfig) -> Document:
    """`data`, which starts at byte `offset` of the (decompressed) file, as text."""
    try:
        return Document(name, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        if cfg.invalid_utf8 == "skip":
            return Document(name, None)
        if cfg.invalid_utf8 == "replace":
            return Document(name, data.decode("utf-8", errors="replace"))
        raise DataError(
            f"{name}: invalid UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}, {error.reason}); "
            "repair it or set prepare.invalid_utf8 (lmjax prepare: --invalid-utf8) to replace or skip"
        ) from error


def _well_formed(name: str, text: str, cfg: PrepareConfig) -> Document:
    """JSON can spell half a surrogate pair (`\\ud800`), which no UTF-8 holds: treated as invalid UTF-8."""
    try:
        text.encode("utf-8")
        return Document(name, text)
    except UnicodeEncodeError as error:
        if cfg.invalid_utf8 == "skip":
            return Document(name, None)
        if cfg.invalid_utf8 == "replace":
            return Document(name, re.sub("[\ud800-\udfff]", "\ufffd", text))
        raise DataError(
            f"{name}: unpaired surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            "repair it or set prepare.invalid_utf8 (lmjax prepare: --invalid-utf8) to replace or skip"
        ) from error


def _chunks(file: InputFile, report: Report) -> Iterator[bytes]:
    return decompress.chunks(file.path, file.name, report)


def _parts(chunks: Iterator[bytes], mark: bytes | None, name: Callable[[int], str], most: int) -> Iterator[bytes]:
    """What lies between the marks, as `split` cuts it, all if there is none; linear however long a part is.

    Raises DataError, by the `name` of its number, for a part of more than `most` bytes, before it holds many more.
    """
    pending: list[bytes] = []
    end, number, size = b"", 1, 0  # of the part that has begun; a mark may begin in its end
    for chunk in chunks:
        *parts, rest = [end + chunk] if mark is None else (end + chunk).split(mark)
        for part in parts:
            check_length(size + len(part), most, name(number))
            yield b"".join([*pending, part])
            pending, size, number = [], 0, number + 1
        kept = len(rest) if mark is None else max(0, len(rest) - len(mark) + 1)
        pending.append(rest[:kept])
        end, size = rest[kept:], size + kept
        check_length(size, most, name(number))
    check_length(size + len(end), most, name(number))
    yield b"".join([*pending, end])


def check_length(size: int, most: int, name: str) -> None:
    """Raise DataError for a document of more bytes than are read."""
    if size > most:
        raise DataError(
            f"{name}: longer than prepare.document_bytes={most:,}; split it, or raise that (lmjax prepare: "
            "--document-bytes)"
        )
