"""Chunks of documents on disk, between one stage of the work and the next.

`curating/STAGE/CHUNK.documents` holds lines of JSON, compressed; beside it lie the keys that a pass made of them, and
`CHUNK.json`, written last: what the steps did. A chunk that has it is done.
"""

import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import zstandard
from etils import epath

from lmjax.data.curate.account import Account
from lmjax.data.curate.document import Document, as_line, from_line
from lmjax.data.curate.step import Arrays, Column, Keys, Learned
from lmjax.record.files import read_bytes, reporting, write_bytes

FOLDER = "curating"
_LEVEL = 3
_HEADER_BYTES = 128


class Chunk(NamedTuple):
    """One chunk after one stage."""

    folder: epath.Path
    """`curating/`."""
    stage: int
    number: int

    def path(self, kind: str) -> epath.Path:
        """Of one of its files."""
        return self.folder / str(self.stage) / f"{self.number:06d}.{kind}"

    @property
    def done(self) -> bool:
        """Whether all its files are there."""
        return self.path("json").exists()

    def documents(self) -> Iterator[Document]:
        """Its documents in order."""
        with self.path("documents").open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            yield from map(from_line, io.TextIOWrapper(stream, "utf-8", newline="\n"))

    def write(self, documents: Sequence[Document], keys: Sequence[Arrays], accounts: Iterable[Account]) -> None:
        """Make it, its record last. `keys` are those of the documents, or none."""
        lines = "".join(map(as_line, documents)).encode("utf-8")
        _write(self.path("documents"), zstandard.ZstdCompressor(level=_LEVEL).compress(lines))
        for name in keys[0] if keys else ():
            values = [of_document[name] for of_document in keys]
            _save(self.path(f"{name}.npy"), np.concatenate(values))
            _save(self.path(f"{name}.ends.npy"), np.cumsum([len(value) for value in values]))
        _save(self.path("held_out.npy"), np.array([document.held_out for document in documents], bool))
        record = {
            "documents": len(documents),
            "keys": sorted(keys[0]) if keys else [],
            "accounts": [dataclasses.asdict(account) for account in accounts],
        }
        _write(self.path("json"), json.dumps(record).encode())

    def record(self) -> dict[str, Any]:
        """What `write` wrote last."""
        return json.loads(read_bytes(self.path("json")))

    @property
    def accounts(self) -> list[Account]:
        """What each step of the stage did."""
        return [Account(**values) for values in self.record()["accounts"]]


def gather_keys(chunks: Sequence[Chunk]) -> Keys:
    """The keys of all documents of the chunks, mapped from their files."""
    filled = [chunk for chunk in chunks if chunk.record()["documents"]]
    names = filled[0].record()["keys"] if filled else ()
    columns = {}
    for name in names:
        values = [_load(chunk.path(f"{name}.npy")) for chunk in filled]
        starts = np.cumsum([0, *(len(value) for value in values)])
        ends = [start + _load(chunk.path(f"{name}.ends.npy")) for chunk, start in zip(filled, starts, strict=False)]
        columns[name] = Column(values, np.concatenate(ends))
    held_out = [_load(chunk.path("held_out.npy")) for chunk in filled]
    return Keys(columns, np.concatenate(held_out) if held_out else np.zeros(0, bool))


def save_learned(folder: epath.Path, step: int, learned: Learned) -> None:
    """Keep what step number `step` learned, its record last."""
    for name, array in learned.arrays.items():
        _save(folder / "learned" / f"{step}.{name}.npy", array)
    record = {"arrays": sorted(learned.arrays), "facts": dict(learned.facts)}
    write_bytes(folder / "learned" / f"{step}.json", json.dumps(record).encode())


def load_learned(folder: epath.Path, step: int) -> Learned | None:
    """What `save_learned` kept, or None where nothing was."""
    path = folder / "learned" / f"{step}.json"
    if not path.exists():
        return None
    record = json.loads(read_bytes(path))
    arrays = {name: _load(folder / "learned" / f"{step}.{name}.npy") for name in record["arrays"]}
    return Learned(arrays, record["facts"])


def _save(path: epath.Path, array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    _write(path, file.getvalue())


def _write(path: epath.Path, content: bytes) -> None:
    """Write a file by way of one that is this process's own: one that has just lost its parent may be at the same."""
    own = path.parent / f"{path.name}.{os.getpid()}"
    write_bytes(own, content)
    with reporting(path, "write"):
        own.replace(path)


def _load(path: epath.Path) -> np.ndarray:
    mapped = path.stat().length > _HEADER_BYTES  # nothing cannot be mapped
    return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
