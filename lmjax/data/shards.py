"""Shards of token ids on disk, and a prepared data set opened for reading.

A shard is three flat little-endian files.
- `.tokens`: uint16 or uint32 ids, documents end to end, each closed by endoftext.
- `.documents`: uint64, where each document ends, counted in tokens: opening a data set reads these, never the tokens.
- `.checksums`: uint32, the CRC-32 of each block of 64 KiB of `.tokens`. A block is checked when it is first read, so
  damage is found before a batch is made of it, at a cost spread over the run (a CRC takes 1/4 ns per byte).
"""

import dataclasses
import itertools
import os
import sys
import zlib
from typing import Literal

import numpy as np
from etils import epath

from lmjax.data import storage
from lmjax.data.manifest import Manifest, ShardManifest, SplitManifest, read_manifest
from lmjax.data.tokenizer import Tokenizer, load_tokenizer, saved_hash
from lmjax.errors import DataError

BLOCK_BYTES = 1 << 16
TOKENIZER = "tokenizer"

# Token files are read in place.
assert sys.byteorder == "little", "lmjax reads its little-endian shards without conversion"


# Writing --------------------------------------------------------------------------------------------------------------


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smaller type that holds every id. Raises DataError beyond 2^31, where int32 model inputs end."""
    if vocab_size > 1 << 31:
        raise DataError(f"vocabulary of {vocab_size} tokens: ids must fit int32")
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_shard(
    directory: epath.Path, name: str, tokens: np.ndarray, document_ends: np.ndarray, text_bytes: int, inexact: int
) -> ShardManifest:
    """Write a shard's files, each atomically, and return its record."""
    content = np.ascontiguousarray(tokens).data.cast("B")
    ends = np.asarray(document_ends, "<u8").tobytes()
    checksums = np.array([zlib.crc32(block) for block in _blocks(content)], "<u4").tobytes()
    for suffix, data in (("tokens", content), ("documents", ends), ("checksums", checksums)):
        storage.write_atomically(directory / f"{name}.{suffix}", data)
    return ShardManifest(
        name=name,
        tokens=len(tokens),
        documents=len(document_ends),
        text_bytes=text_bytes,
        inexact_documents=inexact,
        tokens_hash=storage.hash_bytes(content),
        documents_hash=storage.hash_bytes(ends),
        checksums_hash=storage.hash_bytes(checksums),
    )


def _blocks(content: memoryview) -> list[memoryview]:
    return [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]


# Reading --------------------------------------------------------------------------------------------------------------


class Shard:
    """A shard, memory-mapped, its blocks checked as they are first read."""

    def __init__(self, directory: epath.Path, manifest: ShardManifest, dtype: np.dtype):
        self.path = directory / f"{manifest.name}.tokens"
        self.tokens = np.memmap(os.fspath(self.path), dtype, mode="r")
        self._checksums = _read_index(directory / f"{manifest.name}.checksums", "<u4", manifest.checksums_hash)
        self._unchecked = np.ones(len(self._checksums), bool)
        self._block_tokens = BLOCK_BYTES // dtype.itemsize

    def check(self, start: np.ndarray, stop: np.ndarray) -> None:
        """Check the blocks that hold tokens `start` to `stop` (arrays of spans) if that was not done before.

        Raises DataError naming the block.
        """
        first, last = start // self._block_tokens, (stop - 1) // self._block_tokens
        for step in range(int((last - first).max()) + 1):
            blocks = np.minimum(first + step, last)
            for block in np.unique(blocks[self._unchecked[blocks]]):
                self._check_block(int(block))

    def _check_block(self, block: int) -> None:
        low = block * self._block_tokens
        content = self.tokens[low : low + self._block_tokens]
        if zlib.crc32(content.data) != self._checksums[block]:
            where = f"{self.path}: tokens {low} to {low + len(content)} (byte {low * content.itemsize})"
            raise DataError(f"{where} are damaged: checksum differs; restore the file or prepare the data set again")
        self._unchecked[block] = False


class TokenSplit:
    """The tokens of one split, addressed as one sequence across its shards."""

    def __init__(self, directory: epath.Path, manifest: SplitManifest, dtype: np.dtype, vocab_size: int):
        self.n_tokens = manifest.tokens
        self.n_documents = manifest.documents
        self.n_bytes = manifest.text_bytes
        self.dtype = dtype
        self.vocab_size = vocab_size
        self.shards = [Shard(directory, shard, dtype) for shard in manifest.shards]
        self.shard_starts = np.cumsum([0] + [shard.tokens for shard in manifest.shards])
        self.hash = storage.hash_bytes(*(shard.tokens_hash.encode() for shard in manifest.shards))
        """Names the content: that of the token files in order."""
        self.document_starts = np.zeros(manifest.documents + 1, np.int64)
        """[n_documents + 1]: where each document starts in the sequence; last, where the sequence ends."""
        first = 0
        for shard, start in zip(manifest.shards, self.shard_starts, strict=False):
            ends = _read_index(directory / f"{shard.name}.documents", "<u8", shard.documents_hash)
            self.document_starts[first + 1 : first + 1 + len(ends)] = ends + np.uint64(start)
            first += len(ends)

    def take(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens of the spans [start, start + length), end to end; a span lies within one shard.

        Raises DataError for a damaged block and for an id outside the vocabulary.
        """
        if len(self.shards) == 1:
            return self._take_from(0, starts, lengths)
        shard_of_span = np.searchsorted(self.shard_starts, starts, side="right") - 1
        order = np.argsort(shard_of_span, kind="stable")
        bounds = np.flatnonzero(np.diff(shard_of_span[order], prepend=-1, append=-1))
        by_shard = [
            self._take_from(int(shard_of_span[order[low]]), starts[order[low:high]], lengths[order[low:high]])
            for low, high in itertools.pairwise(bounds)
        ]
        tokens = np.empty(int(lengths.sum()), self.dtype)
        tokens[_spans((np.cumsum(lengths) - lengths)[order], lengths[order])] = np.concatenate(by_shard)
        return tokens

    def _take_from(self, index: int, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        shard, starts = self.shards[index], starts - self.shard_starts[index]
        shard.check(starts, starts + lengths)
        where = _spans(starts, lengths)
        tokens = shard.tokens[where]
        if tokens.max(initial=0) >= self.vocab_size:
            bad = int(np.argmax(tokens >= self.vocab_size))
            raise DataError(
                f"{shard.path}: token id {tokens[bad]} at token {where[bad]} is outside the vocabulary of "
                f"{self.vocab_size}; prepare the data set again"
            )
        return tokens


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers of the ranges [start, start + length), end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)


def _read_index(path: epath.Path, dtype: str, expected_hash: str) -> np.ndarray:
    content = storage.read_bytes(path)
    if storage.hash_bytes(content) != expected_hash:
        raise DataError(f"{path} is damaged: its hash is not the manifest's; restore it or prepare the data set again")
    return np.frombuffer(content, dtype)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared data set on local disk."""

    path: epath.Path
    manifest: Manifest

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the data set was prepared with."""
        return load_tokenizer(self.path / TOKENIZER)

    def split(self, name: Literal["train", "valid"]) -> TokenSplit:
        """A split. Raises DataError if the data set does not have it."""
        manifest = self.manifest
        if name not in manifest.splits:
            raise DataError(f"{self.path} has no {name} split; prepare it with a valid_fraction between 0 and 1")
        return TokenSplit(self.path, manifest.splits[name], np.dtype(manifest.dtype), manifest.vocab_size)


def open_dataset(path: str | os.PathLike[str], *, cache: str | None = None) -> Dataset:
    """The prepared data set at `path`, staged under `cache` first if it is in a bucket.

    Reads the manifest and the tokenizer's files and compares file sizes: quick for any size. Raises DataError for a
    missing or damaged manifest, a missing or truncated shard, a tokenizer that is not the data set's.
    """
    located = storage.locate(path)
    manifest = read_manifest(located)
    if storage.is_remote(located):
        from lmjax.data.staging import stage

        located = stage(located, manifest, cache)
    for split in manifest.splits.values():
        for shard in split.shards:
            _check_sizes(located, shard, manifest.dtype)
    if saved_hash(located / TOKENIZER) != manifest.tokenizer_hash:
        raise DataError(f"the tokenizer in {located / TOKENIZER} is not the one that the data set was made with")
    return Dataset(located, manifest)


def verify_dataset(path: str | os.PathLike[str], *, cache: str | None = None) -> Dataset:
    """`open_dataset`, then every byte compared with the manifest's hashes. DataError names the first bad file."""
    dataset = open_dataset(path, cache=cache)
    for split in dataset.manifest.splits.values():
        for shard in split.shards:
            for name, expected in shard_files(shard).items():
                if storage.hash_file(dataset.path / name) != expected:
                    raise DataError(f"{dataset.path / name} is damaged: its hash is not the manifest's; restore it")
    return dataset


def shard_files(shard: ShardManifest) -> dict[str, str]:
    """File name -> hash of each of the shard's files."""
    return {
        f"{shard.name}.tokens": shard.tokens_hash,
        f"{shard.name}.documents": shard.documents_hash,
        f"{shard.name}.checksums": shard.checksums_hash,
    }


def shard_sizes(shard: ShardManifest, dtype: str) -> dict[str, int]:
    """File name -> size in bytes of each of the shard's files."""
    token_bytes = shard.tokens * np.dtype(dtype).itemsize
    return {
        f"{shard.name}.tokens": token_bytes,
        f"{shard.name}.documents": shard.documents * 8,
        f"{shard.name}.checksums": -(-token_bytes // BLOCK_BYTES) * 4,
    }


def _check_sizes(directory: epath.Path, shard: ShardManifest, dtype: str) -> None:
    for name, expected in shard_sizes(shard, dtype).items():
        path = directory / name
        if not path.exists():
            raise DataError(f"{path} is missing; restore it or prepare the data set again")
        found = path.stat().length
        if found != expected:
            raise DataError(
                f"{path} has {found} bytes instead of {expected} ({shard.tokens} tokens of {dtype}): truncated or of "
                "another type; restore it or prepare the data set again"
            )
