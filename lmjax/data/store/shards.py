"""Shards of token ids on disk, and the splits that they make up.

A shard is three flat little-endian files, or four or five.
- `.tokens`: uint16 or uint32 ids, documents end to end, each closed by endoftext.
- `.documents`: uint64, where each document ends, counted in tokens: opening a data set reads these, never the tokens.
- `.checksums`: uint32, the CRC-32 of each block of 64 KiB of `.tokens`. A block is checked when it is first read, and
  again when somebody has written to the file, so damage is found before a batch is made of it, at a cost spread over
  the run (a CRC takes 1/4 ns per byte).
- `.scored`: of conversations, a bit for each token, the first one lowest in its byte: whether a model is trained on to
  write it.
- `.weights`: where some of that counts more than the rest, a byte for each token: its weight in hundredths.

Opening a data set reads the last two whole, against their hashes.
"""

import itertools
import re
import sys
import zlib
from collections.abc import Iterator
from typing import Literal, NoReturn

import numpy as np
from etils import epath

from lmjax.data.store.manifest import Manifest, ShardManifest, SplitManifest
from lmjax.data.store.mapped import Mapped
from lmjax.errors import DataError
from lmjax.record import files

BLOCK_BYTES = 1 << 16
ONE = 100
"""The weight of a token that counts in full, in hundredths."""
TOKENIZER = "tokenizer"
_FILE = re.compile(r"(train|valid)-\d{5,}\.(tokens|documents|checksums|scored|weights)")

# Token files are read in place.
assert sys.byteorder == "little", "lmjax reads its little-endian shards without conversion"


# Writing --------------------------------------------------------------------------------------------------------------


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smaller type that holds every id. Raises DataError beyond 2^31, where int32 model inputs end."""
    if vocab_size > 1 << 31:
        raise DataError(f"vocabulary of {vocab_size} tokens: ids must fit int32")
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_shard(
    directory: epath.Path,
    name: str,
    tokens: np.ndarray,
    document_ends: np.ndarray,
    text_bytes: int,
    inexact: int = 0,
    unknown: int = 0,
    weights: np.ndarray | None = None,
    truncated: int = 0,
) -> ShardManifest:
    """Write a shard's files, each atomically, and return its record. `weights` has the hundredths of each token, uint8,
    if a model is trained on some alone to write."""
    content = np.ascontiguousarray(tokens).data.cast("B")
    ends = np.asarray(document_ends, "<u8").tobytes()
    checksums = np.array([zlib.crc32(block) for block in _blocks(content)], "<u4").tobytes()
    bits = None if weights is None else np.packbits(weights > 0, bitorder="little").tobytes()
    uneven = None if weights is None or np.isin(weights, (0, ONE)).all() else weights.tobytes()
    written = {"tokens": content, "documents": ends, "checksums": checksums, "scored": bits, "weights": uneven}
    for suffix, data in written.items():
        if data is not None:
            files.write_bytes(directory / f"{name}.{suffix}", data)
    return ShardManifest(
        name=name,
        tokens=len(tokens),
        documents=len(document_ends),
        text_bytes=text_bytes,
        inexact_documents=inexact,
        unknown_documents=unknown,
        tokens_hash=files.hash_bytes(content),
        documents_hash=files.hash_bytes(ends),
        checksums_hash=files.hash_bytes(checksums),
        scored_hash=None if bits is None else files.hash_bytes(bits),
        scored_tokens=None if weights is None else int((weights > 0).sum()),
        weights_hash=None if uneven is None else files.hash_bytes(uneven),
        truncated_documents=truncated,
    )


def _blocks(content: memoryview) -> list[memoryview]:
    return [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]


# Reading --------------------------------------------------------------------------------------------------------------


class Shard:
    """A shard's tokens, memory-mapped, and the checksums of their blocks."""

    def __init__(self, directory: epath.Path, manifest: ShardManifest, dtype: np.dtype):
        self.path = directory / f"{manifest.name}.tokens"
        self._mapped = Mapped(self.path, dtype, manifest.tokens)
        self.checksums = _read_index(directory / f"{manifest.name}.checksums", "<u4", manifest.checksums_hash)
        self._scored, self._weights = (
            None if expected is None else _read_index(directory / f"{manifest.name}.{suffix}", "u1", expected)
            for suffix, expected in (("scored", manifest.scored_hash), ("weights", manifest.weights_hash))
        )

    @property
    def tokens(self) -> np.ndarray:
        return self._mapped.array

    def weights(self, where: np.ndarray) -> np.ndarray:
        """How much each of these tokens counts as one to be written, in hundredths, uint8."""
        if self._weights is not None:
            return self._weights[where]
        if self._scored is None:
            return np.full(len(where), ONE, np.uint8)
        return (self._scored[where >> 3] >> (where & 7) & 1) * np.uint8(ONE)

    def renew(self) -> bool:
        """Whether somebody has written to the tokens since they were last looked at: then no block is checked."""
        return self._mapped.renew()

    def check_block(self, block: int) -> None:
        """Raises DataError, naming the place, if the block is not what was written."""
        size = BLOCK_BYTES // self.tokens.itemsize
        low = block * size
        content = self.tokens[low : low + size]
        if zlib.crc32(content.data) != self.checksums[block]:
            where = f"{self.path}: tokens {low} to {low + len(content)} (byte {low * content.itemsize})"
            raise DataError(f"{where} are damaged: checksum differs; restore the file or prepare the data set again")


class TokenSplit:
    """The tokens of one split, addressed as one sequence across its shards."""

    def __init__(self, directory: epath.Path, manifest: SplitManifest, dtype: np.dtype, vocab_size: int):
        self.n_tokens = manifest.tokens
        self.n_documents = manifest.documents
        self.n_scored = manifest.scored_tokens
        """Tokens that a model is trained on to write; None where those are all of them."""
        self.n_bytes = manifest.text_bytes
        self.dtype = dtype
        self.vocab_size = vocab_size
        self.shards = [Shard(directory, shard, dtype) for shard in manifest.shards]
        self.shard_starts = np.cumsum([0] + [shard.tokens for shard in manifest.shards])
        self.hash, self.digest = manifest.hash, manifest.digest
        """Names of the content: see SplitManifest."""
        self.document_starts = _document_starts(directory, manifest)
        """int64 [n_documents + 1]: where each document starts in the sequence; last, where the sequence ends."""
        self._block_starts = np.cumsum([0] + [len(shard.checksums) for shard in self.shards])
        self._unchecked = np.ones(self._block_starts[-1], bool)

    def take(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens of the spans [start, start + length), end to end; every span must lie within one shard.

        Raises DataError for a damaged block and for an id outside the vocabulary.
        """
        shard_of_span = np.searchsorted(self.shard_starts, starts, side="right") - 1
        inside = starts - self.shard_starts[shard_of_span]
        assert (starts + lengths <= self.shard_starts[shard_of_span + 1]).all(), "a span leaves its shard"
        used = np.flatnonzero(np.bincount(shard_of_span)).tolist()
        self._renew(used)
        while True:
            self._check(shard_of_span, inside, lengths)
            tokens = self._gathered(used, shard_of_span, inside, lengths)
            if not self._renew(used):  # while they were read
                break
        if tokens.max() >= self.vocab_size:
            self._raise_outside_vocabulary(tokens, shard_of_span, inside, lengths)
        return tokens

    def weights(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """How much each token of the spans, as `take` has them, counts as one that a model is trained on to write,
        float32: 0 for what is not scored, and by default 1."""
        shard_of_span = np.searchsorted(self.shard_starts, starts, side="right") - 1
        where = spans(starts - self.shard_starts[shard_of_span], lengths)
        shard_of_token = np.repeat(shard_of_span, lengths)
        hundredths = np.empty(len(where), np.uint8)
        for index in np.unique(shard_of_span).tolist():
            mine = shard_of_token == index
            hundredths[mine] = self.shards[index].weights(where[mine])
        return hundredths / np.float32(ONE)

    def _renew(self, shards: list[int]) -> bool:
        """Whether somebody has written to one of the shards: then its blocks are to be checked again."""
        written = [index for index in shards if self.shards[index].renew()]
        for index in written:
            self._unchecked[self._block_starts[index] : self._block_starts[index + 1]] = True
        return bool(written)

    def _gathered(
        self, used: list[int], shard_of_span: np.ndarray, inside: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        views = {index: self.shards[index].tokens.data for index in used}  # whose slices cost less than arrays'
        bounds = zip(shard_of_span.tolist(), inside.tolist(), (inside + lengths).tolist(), strict=True)
        return np.frombuffer(b"".join([views[index][low:high] for index, low, high in bounds]), self.dtype)

    def documents(self) -> Iterator[np.ndarray]:
        """The tokens of each document, the endoftext that closes it left out, in the order of the shards."""
        for start, end in itertools.pairwise(self.document_starts):
            if end - start > 1:
                yield self.take(np.array([start]), np.array([end - start - 1]))

    def _check(self, shard_of_span: np.ndarray, inside: np.ndarray, lengths: np.ndarray) -> None:
        """Check the blocks that the spans lie in, unless that was done before."""
        size = BLOCK_BYTES // self.dtype.itemsize
        offset = self._block_starts[shard_of_span]
        first, last = inside // size + offset, (inside + lengths - 1) // size + offset
        for step in range(int((last - first).max()) + 1):
            blocks = np.minimum(first + step, last)
            for block in {*blocks[self._unchecked[blocks]].tolist()}:
                index = int(np.searchsorted(self._block_starts, block, side="right")) - 1
                self.shards[index].check_block(block - int(self._block_starts[index]))
                self._unchecked[block] = False

    def _raise_outside_vocabulary(
        self, tokens: np.ndarray, shard_of_span: np.ndarray, inside: np.ndarray, lengths: np.ndarray
    ) -> NoReturn:
        first = np.argmax(tokens >= self.vocab_size)
        ends = np.cumsum(lengths)
        span = np.searchsorted(ends, first, side="right")
        raise DataError(
            f"{self.shards[shard_of_span[span]].path}: token id {tokens[first]} at token "
            f"{inside[span] + lengths[span] - ends[span] + first} is outside the vocabulary of {self.vocab_size}; "
            "prepare the data set again"
        )


def _document_starts(directory: epath.Path, manifest: SplitManifest) -> np.ndarray:
    starts = np.zeros(manifest.documents + 1, np.int64)
    document = token = 0
    for shard in manifest.shards:
        ends = _read_index(directory / f"{shard.name}.documents", "<u8", shard.documents_hash)
        starts[document + 1 : document + 1 + len(ends)] = ends + np.uint64(token)
        document += len(ends)
        token += shard.tokens
    return starts


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers of the ranges [start, start + length), end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)


def _read_index(path: epath.Path, dtype: str, expected_hash: str) -> np.ndarray:
    content = files.read_bytes(path)
    if files.hash_bytes(content) != expected_hash:
        raise DataError(f"{path} is damaged: its hash is not the manifest's; restore it or prepare the data set again")
    return np.frombuffer(content, dtype)


def shard_files(shard: ShardManifest) -> dict[str, str]:
    """File name -> hash of each of the shard's files."""
    return {
        f"{shard.name}.tokens": shard.tokens_hash,
        f"{shard.name}.documents": shard.documents_hash,
        f"{shard.name}.checksums": shard.checksums_hash,
        **({} if shard.scored_hash is None else {f"{shard.name}.scored": shard.scored_hash}),
        **({} if shard.weights_hash is None else {f"{shard.name}.weights": shard.weights_hash}),
    }


def unlisted(directory: epath.Path, manifest: Manifest) -> list[epath.Path]:
    """Files of shards in a directory that its manifest does not list."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    listed = {name for shard in shards for name in shard_files(shard)}
    return sorted(path for path in directory.iterdir() if _FILE.fullmatch(path.name) and path.name not in listed)


def shard_sizes(shard: ShardManifest, dtype: str) -> dict[str, int]:
    """File name -> size in bytes of each of the shard's files."""
    token_bytes = shard.tokens * np.dtype(dtype).itemsize
    return {
        f"{shard.name}.tokens": token_bytes,
        f"{shard.name}.documents": shard.documents * 8,
        f"{shard.name}.checksums": -(-token_bytes // BLOCK_BYTES) * 4,
        **({} if shard.scored_hash is None else {f"{shard.name}.scored": -(-shard.tokens // 8)}),
        **({} if shard.weights_hash is None else {f"{shard.name}.weights": shard.tokens}),
    }
