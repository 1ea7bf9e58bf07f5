"""Documents to shards, and on from the shards of an interrupted run."""

import json

import numpy as np
from etils import epath

from lmjax.data.prepare import records
from lmjax.data.prepare.corpus import Split
from lmjax.data.prepare.encoding import One
from lmjax.data.store.manifest import ShardManifest, as_json
from lmjax.data.store.shards import shard_files, shard_sizes, token_dtype, write_shard
from lmjax.process.faults import fault
from lmjax.record.files import has_size, hash_file, read_bytes, write_bytes


class Writer:
    """Collects the documents of one split and writes a shard whenever it is full."""

    def __init__(self, directory: epath.Path, split: Split, shard_tokens: int, vocab_size: int, *, scores: bool):
        """`scores`: not all tokens are scored, and the shards say which."""
        self._directory = directory
        self._scores = scores
        self._split = split
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(vocab_size)
        self.shards: list[ShardManifest] = []
        self.unknown = 0
        """Documents that the tokenizer cannot represent in full, those of the shards included."""
        self.resumed = 0
        """Documents that an interrupted run is done with."""
        self._resume()
        self._start_shard()

    def _start_shard(self) -> None:
        self._documents: list[One] = []
        self._tokens = self._unknown = self._left_out = 0

    def add(self, document: One) -> None:
        """The next document, endoftext included; without any token it is left out, and counted."""
        self._unknown += document.unknown
        self.unknown += document.unknown
        if len(document.tokens) == 0:
            self._left_out += 1
            return
        self._documents.append(document)
        self._tokens += len(document.tokens)
        if self._tokens >= self._shard_tokens:
            self.close()

    @property
    def count(self) -> int:
        """Documents, those of the shards and those that wait for the next one."""
        return sum(shard.documents for shard in self.shards) + len(self._documents)

    def close(self) -> None:
        """Write what there is as a shard, its record last."""
        if not self._documents:
            return
        shard = write_shard(
            self._directory,
            self._name(),
            np.concatenate([document.tokens for document in self._documents]),
            np.cumsum([len(document.tokens) for document in self._documents]),
            sum(document.n_bytes for document in self._documents),
            inexact=sum(not document.exact for document in self._documents),
            unknown=self._unknown,
            weights=np.concatenate([document.weights for document in self._documents]) if self._scores else None,
            truncated=sum(document.truncated for document in self._documents),
        )
        record = json.loads(as_json(shard)) | {"left_out": self._left_out}
        write_bytes(self._record(shard.name), json.dumps(record, sort_keys=True).encode())
        self.shards.append(shard)
        self._start_shard()
        fault("prepare.shard")

    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):05d}"

    def _record(self, name: str) -> epath.Path:
        return self._directory / records.FOLDER / f"{name}.json"

    def _resume(self) -> None:
        """Take over the shards of an interrupted run, as long as their files are there in full."""
        while (record := self._record(self._name())).exists():
            values = json.loads(read_bytes(record))
            left_out = values.pop("left_out", 0)
            shard = ShardManifest(**values)
            if not self._is_intact(shard):
                break
            self.shards.append(shard)
            self.unknown += shard.unknown_documents
            self.resumed += shard.documents + left_out

    def _is_intact(self, shard: ShardManifest) -> bool:
        sizes = shard_sizes(shard, self._dtype)
        return all(
            has_size(self._directory / name, sizes[name]) and hash_file(self._directory / name) == digest
            for name, digest in shard_files(shard).items()
        )
