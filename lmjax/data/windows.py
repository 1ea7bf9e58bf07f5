"""Fixed-length windows of a split: by random access, in an order of each epoch for training and one for evaluation.

An epoch's stream is all documents of the split in an order drawn anew for the epoch, over all shards together, end to
end, each closed by its endoftext. Window w of the stream is tokens [s + w T, s + w T + T], so neighbours share one
token and no token is a target twice. The stream has fewer than T targets too many; the epoch's own offset s says how
many of them are left out at its start, and the rest at its end. So a corpus of few documents, too, is cut at other
places in every epoch. Windows are drawn in an order of their own.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from lmjax.data.batch import Batch
from lmjax.data.permutation import drawn, permuted
from lmjax.data.store.shards import TokenSplit, spans
from lmjax.errors import DataError

_BLOCK = 8192  # windows of an epoch that are drawn and looked up at a time
_SUBSET_SEED = 0x5B5E7  # far from the seeds that people choose for the order of epochs
Documents = Literal["joined", "separate", "whole"]


@dataclasses.dataclass(frozen=True)
class _Stream:
    """Documents in some order, end to end."""

    order: np.ndarray
    """Which document comes n-th."""
    starts: np.ndarray
    """int64 [n_documents + 1]: where the n-th document starts in the stream."""


class _Pieces(NamedTuple):
    """The parts of documents that rows are made of, row after row."""

    per_row: np.ndarray
    where: np.ndarray
    """Where each of them starts in the split."""
    lengths: np.ndarray


class Windows:
    """The training samples of one split: sample `cursor`, for any cursor from 0, is a pure function of the arguments.

    Cursor c is window `c % n_windows` of epoch `c // n_windows`, in the epoch's own order. Memory: 20 bytes per
    document, 12 more while a batch lies across two epochs; 16 bytes for each part of a document in 4 blocks of windows.
    """

    def __init__(self, split: TokenSplit, seq_len: int, seed: int, documents: Documents, limit: int | None = None):
        """The windows are cut from the documents that `subset` chooses for a `limit`, or from all of them."""
        self._chosen = None if limit is None else subset(split, limit)
        lengths = np.diff(split.document_starts)
        self.n_tokens = split.n_tokens if self._chosen is None else int(lengths[self._chosen].sum())
        self.n_windows = (self.n_tokens - 1) // seq_len
        if self.n_windows == 0:
            raise DataError(
                f"{self.n_tokens} tokens in {split.shards[0].path.parent} do not make one window of "
                f"data.seq_len={seq_len}; shorten it or add text"
            )
        self._split = split
        self._seq_len = seq_len
        self._seed = seed
        self._documents = documents
        # Per instance, unlike a cache on the method, so that a dropped Windows frees its memory.
        self._stream = functools.lru_cache(maxsize=2)(self._make_stream)
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    def read(self, cursors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The windows at `cursors` (int64 [B]), all at once.

        Returns tokens [B, T + 1] in the split's dtype and segments int32 [B, T + 1]: which document of its row, from 0,
        a token belongs to, or 0 everywhere if documents are joined. Raises DataError for damaged tokens.
        """
        epochs, windows = np.divmod(cursors, self.n_windows)
        blocks, rows = np.divmod(windows, _BLOCK)
        blocks += epochs * (self.n_windows // _BLOCK + 1)
        if (blocks == blocks[0]).all():
            return self._read_block(int(blocks[0]), rows)
        tokens_BU = np.empty((len(cursors), self._seq_len + 1), self._split.dtype)
        segments_BU = np.empty(tokens_BU.shape, np.int32)
        for block in np.unique(blocks):
            here = blocks == block
            tokens_BU[here], segments_BU[here] = self._read_block(int(block), rows[here])
        return tokens_BU, segments_BU

    def _read_block(self, block: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pieces, first = self._block(block)
        per_row = pieces.per_row[rows]
        chosen = spans(first[rows], per_row)
        chosen_pieces = _Pieces(per_row, pieces.where[chosen], pieces.lengths[chosen])
        return _read_pieces(self._split, chosen_pieces, self._seq_len + 1, self._documents)

    def _make_block(self, block: int) -> tuple[_Pieces, np.ndarray]:
        """The pieces of the windows of a block, and which of them is the first of each window."""
        epoch, part = divmod(block, self.n_windows // _BLOCK + 1)
        windows = np.arange(part * _BLOCK, min((part + 1) * _BLOCK, self.n_windows))
        numbers = permuted(windows, self.n_windows, self._seed, 2 * epoch + 1)
        left_out = (self.n_tokens - 1) % self._seq_len
        offset = permuted(np.array([0]), left_out + 1, self._seed, 2 * epoch)
        pieces = _pieces(self._split, self._stream(epoch), offset + numbers * self._seq_len, self._seq_len + 1)
        return pieces, np.cumsum(pieces.per_row) - pieces.per_row

    def _make_stream(self, epoch: int) -> _Stream:
        n_documents = self._split.n_documents if self._chosen is None else len(self._chosen)
        order = permuted(np.arange(n_documents), n_documents, self._seed, 2 * epoch)
        return _stream(self._split, order if self._chosen is None else self._chosen[order])


def subset(split: TokenSplit, limit: int) -> np.ndarray:
    """Random documents that come to `limit` tokens, int64 [some]: the first ones of an order that no setting changes.

    What a smaller limit chooses is a part of it. The last one brings it to the limit or beyond.
    """
    order = permuted(np.arange(split.n_documents), split.n_documents, _SUBSET_SEED, 0)
    lengths = np.diff(split.document_starts)[order]
    return order[: int(np.searchsorted(np.cumsum(lengths), limit)) + 1]


def _stream(split: TokenSplit, order: np.ndarray) -> _Stream:
    lengths = np.diff(split.document_starts)[order]
    starts = np.zeros(len(order) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return _Stream(order.astype(np.int32 if len(order) < 1 << 31 else np.int64), starts)


def _pieces(split: TokenSplit, stream: _Stream, starts: np.ndarray, length: int) -> _Pieces:
    """What makes up the rows of `length` tokens of the stream from each of `starts`."""
    first = np.searchsorted(stream.starts, starts, side="right") - 1
    last = np.searchsorted(stream.starts, starts + length, side="left") - 1
    per_row = last - first + 1
    rank = spans(first, per_row)
    row_start = np.repeat(starts, per_row)
    begin = np.maximum(stream.starts[rank], row_start)
    lengths = np.minimum(stream.starts[rank + 1], row_start + length) - begin
    return _Pieces(per_row, split.document_starts[stream.order[rank]] + begin - stream.starts[rank], lengths)


def _read_pieces(
    split: TokenSplit, pieces: _Pieces, length: int, documents: Documents
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `length` tokens, and their segments, as `Windows.read` has them."""
    tokens = split.take(pieces.where, pieces.lengths).reshape(len(pieces.per_row), length)
    if documents == "joined":
        return tokens, np.broadcast_to(np.int32(0), tokens.shape)
    segment = spans(np.zeros_like(pieces.per_row), pieces.per_row).astype(np.int32)
    return tokens, np.repeat(segment, pieces.lengths).reshape(tokens.shape)


def as_batch(
    tokens_BU: np.ndarray,
    segments_BU: np.ndarray,
    ids_B: np.ndarray,
    documents: Documents,
    weights_BU: np.ndarray | None = None,
) -> Batch:
    """Rows of T + 1 tokens as T inputs and T targets.

    A target weighs 0 where it is in another document than its input, else what `weights_BU` say, or 1. Padding is in
    segment -1.
    """
    tokens_BT = tokens_BU[:, :-1].astype(np.int32)
    targets_BT = tokens_BU[:, 1:].astype(np.int32)
    ids_B = (ids_B % (1 << 31)).astype(np.int32)
    if documents == "joined":
        return Batch(tokens_BT, targets_BT, _ones(tokens_BT.shape), ids_B)
    segments_BT = np.ascontiguousarray(segments_BU[:, :-1])
    weights_BT = (segments_BU[:, 1:] == segments_BT).astype(np.float32)
    if weights_BU is not None:
        weights_BT *= weights_BU[:, 1:]
    return Batch(tokens_BT, targets_BT, weights_BT, ids_B, segments_BT, _positions(segments_BT))


@functools.lru_cache(maxsize=4)
def _ones(shape: tuple[int, ...]) -> np.ndarray:
    """One array, read only, for all batches of a shape: a third of what they would write anew."""
    ones = np.ones(shape, np.float32)
    ones.flags.writeable = False
    return ones


def _positions(segments_BT: np.ndarray) -> np.ndarray:
    """int32, counted from where each document starts in its row (a row that opens within a document starts at 0); -1
    for padding."""
    begins_BT = np.ones(segments_BT.shape, bool)
    np.not_equal(segments_BT[:, 1:], segments_BT[:, :-1], out=begins_BT[:, 1:])
    starts = np.flatnonzero(begins_BT)
    lengths = np.diff(starts, append=segments_BT.size)
    positions = np.arange(segments_BT.size, dtype=np.int32) - np.repeat(starts.astype(np.int32), lengths)
    return np.where(segments_BT < 0, np.int32(-1), positions.reshape(segments_BT.shape))


# Evaluation -----------------------------------------------------------------------------------------------------------


def evaluation_batches(
    split: TokenSplit, seq_len: int, batch_size: int, documents: Documents, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """The whole split once, in windows that share no context, cut from documents in stored order.

    For a split and a `seq_len` they come in one order, drawn so that the first batches are a fair sample; the last one
    is padded.
    Every token of the split is a target with weight 1 exactly once, but for the very first, which nothing precedes,
    and, if documents are separate, the first of each document. So n_tokens - 1 targets are scored (n_tokens -
    n_documents if separate), whatever `seq_len` and `batch_size` are. Every batch has shape [batch_size, seq_len]; what
    pads the last has weight 0 and the token endoftext. `rows` are the numbers of those rows that this process makes,
    in ascending order; all by default.
    """
    rows = np.arange(batch_size) if rows is None else rows
    stream = _stream(split, np.arange(split.n_documents))
    n_targets = split.n_tokens - 1
    for low in range(0, -(-n_targets // seq_len), batch_size):
        windows = drawn(low + rows, n_targets // seq_len)
        tokens_BU, segments_BU = _padded_rows(split, stream, windows, seq_len, documents)
        batch = as_batch(tokens_BU, segments_BU, low + rows, documents)
        scored_BT = windows[:, None] * seq_len + np.arange(seq_len) < n_targets
        yield dataclasses.replace(batch, weights_BT=batch.weights_BT * scored_BT)


def document_batches(
    split: TokenSplit, seq_len: int, batch_size: int, begin_id: int, *, whole: bool = True
) -> Iterator[Batch]:
    """Every document by itself, from its start: a row reads `begin_id`, then tokens, and predicts at most `seq_len`.

    A longer document goes on in further rows, each of which reads `begin_id` first, or ends there if not `whole`. No
    endoftext is read or scored: n_tokens - n_documents targets, all with weight 1. Every batch has shape
    [batch_size, seq_len]; what pads it has weight 0.
    """
    sizes = np.diff(split.document_starts) - 1
    rows_per_document = -(-sizes // seq_len) if whole else np.minimum(sizes, 1)
    first_row = np.cumsum(rows_per_document) - rows_per_document
    document = np.repeat(np.arange(len(sizes)), rows_per_document)
    offset = (np.arange(len(document)) - first_row[document]) * seq_len
    for low in range(0, len(document), batch_size):
        rows = slice(low, low + batch_size)
        lengths = np.minimum(sizes[document[rows]] - offset[rows], seq_len)
        targets_BT = np.full((batch_size, seq_len), begin_id, np.int32)
        scored_BT = np.arange(seq_len) < np.pad(lengths, (0, batch_size - len(lengths)))[:, None]
        targets_BT[scored_BT] = split.take(split.document_starts[document[rows]] + offset[rows], lengths)
        tokens_BT = np.concatenate([np.full((batch_size, 1), begin_id, np.int32), targets_BT[:, :-1]], axis=1)
        ids_B = np.arange(low, low + batch_size, dtype=np.int32)
        yield Batch(tokens_BT, targets_BT, scored_BT.astype(np.float32), ids_B)


def _padded_rows(
    split: TokenSplit, stream: _Stream, numbers: np.ndarray, seq_len: int, documents: Documents
) -> tuple[np.ndarray, np.ndarray]:
    """The windows of these numbers, whole ones first, as far as the stream goes; then padding, in a segment of its
    own."""
    n_full, rest = divmod(split.n_tokens - 1, seq_len)
    tokens_BU = np.zeros((len(numbers), seq_len + 1), split.dtype)
    segments_BU = np.full(tokens_BU.shape, seq_len + 1, np.int32)
    full = int((numbers < n_full).sum())
    for rows, length in ((slice(0, full), seq_len + 1), (slice(full, full + 1), rest + 1)):
        starts = numbers[rows] * seq_len
        if len(starts) and starts[0] < split.n_tokens - 1:
            found = _read_pieces(split, _pieces(split, stream, starts, length), length, documents)
            tokens_BU[rows, :length], segments_BU[rows, :length] = found
    return tokens_BU, segments_BU
