"""What a curation leaves: files of documents for `lmjax prepare`, and `curation.json`, how they came about."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import zstandard
from etils import epath

from lmjax.data.config import PrepareConfig
from lmjax.data.curate.account import Account
from lmjax.data.curate.document import Document, as_line
from lmjax.data.prepare import sources
from lmjax.data.prepare.corpus import curation_of, fingerprint_of
from lmjax.data.prepare.sources import list_inputs, read_records
from lmjax.errors import DataError
from lmjax.record import formats
from lmjax.record.files import drafted, hash_bytes, hash_file, naming, read_bytes, reporting, write_bytes

FILE = "curation.json"
PAGE = "curation.html"
FORMAT = 1
_LEVEL = 6
_SPLITS = ("train", "valid")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of documents, as JSON lines, compressed."""

    name: str
    documents: int
    text_bytes: int
    hash: str
    """BLAKE2b of the file."""


@dataclasses.dataclass(frozen=True)
class Curation:
    """A finished curation."""

    recipe: dict[str, Any]
    """All that fixed it, and a hash of the input files' content."""
    steps: list[Account]
    """What reading and each step did, in order."""
    shards: list[Shard]

    @property
    def fingerprint(self) -> str:
        """A hash of the documents and of how they came about, wherever the input files lay."""
        steps = [{name: value for name, value in dataclasses.asdict(step).items() if value is not None}
                 for step in self.steps]  # fmt: skip
        content = {"steps": steps, "shards": [dataclasses.asdict(shard) for shard in self.shards]}
        return hash_bytes(json.dumps(content, sort_keys=True).encode())

    def lines(self) -> list[str]:
        """What was left after each step, and the fingerprint."""
        counts = [
            f"{one.step:<18} {one.kept[0]:>12,} documents {one.kept[1]:>16,} bytes"
            + ("" if one.tokens is None else f" {one.tokens[1]:>14,} tokens")
            for one in self.steps
        ]
        return [*counts, f"fingerprint {self.fingerprint}"]


def write_shards(directory: epath.Path, documents: Iterator[Document], shard_bytes: int) -> list[Shard]:
    """Write the documents, training and validation apart, to files of about so many bytes of text."""
    writers = {split: _Writer(directory, split, shard_bytes) for split in _SPLITS}
    try:
        for document in documents:
            writers["valid" if document.held_out else "train"].add(document)
        return [shard for writer in writers.values() for shard in writer.finish()]
    finally:
        for writer in writers.values():
            writer.stop()


class _Writer:
    """The files of one split."""

    def __init__(self, directory: epath.Path, split: str, shard_bytes: int):
        self._directory, self._split, self._most = directory, split, shard_bytes
        self._shards: list[Shard] = []
        self._open: Any = None
        """The draft of a file that has begun, as a context."""

    def add(self, document: Document) -> None:
        if self._open is None:
            self._path = self._directory / f"{self._split}-{len(self._shards):05d}.jsonl.zst"
            self._open = drafted(self._path)
            with reporting(self._path, "write"):
                self._file = self._open.__enter__()
            self._stream = zstandard.ZstdCompressor(level=_LEVEL).stream_writer(self._file, closefd=False)
            self._documents = self._bytes = 0
        with reporting(self._path, "write"), naming(self._path, self._most):
            self._stream.write(as_line(document).encode())
        self._documents += 1
        self._bytes += document.size
        if self._bytes >= self._most:
            self._close()

    def finish(self) -> list[Shard]:
        """All files."""
        if self._open is not None:
            self._close()
        return self._shards

    def stop(self) -> None:
        """Take a draft away that was not finished."""
        if self._open is not None:
            unfinished = RuntimeError("not finished")
            try:
                self._open.__exit__(RuntimeError, unfinished, None)
            except RuntimeError:
                self._open = None

    def _close(self) -> None:
        with reporting(self._path, "write"), naming(self._path, self._most):
            self._stream.close()
            self._open.__exit__(None, None, None)
        self._open = None
        self._shards.append(Shard(self._path.name, self._documents, self._bytes, hash_file(self._path)))


def read_documents(pattern: str, cfg: PrepareConfig) -> Iterator[Document]:
    """The documents of files, by glob, with what a curation says of those that it has made; of others the source is the
    pattern. Those without any text are left out."""
    for file in list_inputs((pattern,)):
        if curation_of(file) is not None:
            yield from (Document(**record) for record in read_records((file,), cfg))
        else:
            found = sources.read_documents((file,), cfg, lambda n_bytes: None)
            yield from (Document(document.text, document.name, pattern) for document in found if document.text)


def write_curation(directory: epath.Path, curation: Curation) -> None:
    """Write `curation.json`: from now on the curation is finished."""
    content = dataclasses.asdict(curation) | {"fingerprint": curation.fingerprint} | formats.stamp(FORMAT)
    write_bytes(directory / FILE, json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def verified_curation(directory: epath.Path) -> Curation:
    """`read_curation`, once it is sure that every file is as it was written. Raises DataError where one is not."""
    curation = read_curation(directory)
    fingerprint_of(directory / FILE)
    return curation


def read_curation(directory: epath.Path) -> Curation:
    """The curation of a finished directory. Raises DataError where its record is not as it was written."""
    path = directory / FILE
    try:
        content = formats.unstamped(json.loads(read_bytes(path)), path, FORMAT, DataError)
        curation = Curation(
            recipe=content["recipe"],
            steps=[Account(**values) for values in content["steps"]],
            shards=[Shard(**values) for values in content["shards"]],
        )
        if curation.fingerprint != content["fingerprint"]:
            raise ValueError("its fingerprint is not that of its content")
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); curate again into a new directory") from error
    return curation
