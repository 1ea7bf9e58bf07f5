"""Rows of whole documents: for conversations, and for all else that loses its sense when it is cut.

Which documents share a row is settled once, by their lengths alone: the longest first, each into the row that it fills
best (best-fit decreasing; for language models: Ding et al. 2024, arXiv:2404.10830). So a sample is a row by its number,
as a window is, and every epoch draws an order of rows. No document sees another, so the company of its row changes
nothing of what is learned from it.
"""

from collections.abc import Iterator

import numpy as np

from lmjax.data.batch import Batch
from lmjax.data.permutation import drawn, permuted
from lmjax.data.store.shards import TokenSplit, spans
from lmjax.data.windows import as_batch, subset
from lmjax.errors import DataError

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""tokens [B, T + 1] in the split's type; segments int32, which document of its row a token belongs to, -1 for padding;
weights float32, how much a token counts as one to be written."""


class PackedRows:
    """The training samples of one split: sample `cursor`, for any cursor from 0, is a pure function of the arguments.

    Cursor c is row `c % n_rows` of epoch `c // n_rows`, in the epoch's own order. Memory: 8 bytes per document and row.
    """

    def __init__(self, split: TokenSplit, seq_len: int, seed: int = 0, limit: int | None = None):
        """The rows are made of the documents that `windows.subset` chooses for a `limit`, or of all. Raises DataError
        for a document that is longer than a row."""
        chosen = np.arange(split.n_documents) if limit is None else subset(split, limit)
        lengths = np.diff(split.document_starts)[chosen]
        self._size = seq_len + 1
        if (longest := int(lengths.max())) > self._size:
            raise DataError(
                f"{split.shards[0].path.parent}: document {chosen[lengths.argmax()]} has {longest:,} tokens, and with "
                f"data.documents=whole a row holds {self._size:,}: raise data.seq_len to {longest - 1}, or prepare it "
                "with chat.longest (lmjax prepare: --longest) and too_long"
            )
        rows = pack(lengths, self._size)
        self._split, self._seed = split, seed
        self._documents = chosen[np.argsort(rows, kind="stable")]
        self._row_starts = np.cumsum([0, *np.bincount(rows)])
        self.n_tokens, self.n_rows = int(lengths.sum()), len(self._row_starts) - 1

    def read(self, cursors: np.ndarray) -> Rows:
        """The samples at `cursors` (int64 [B]), all at once. Raises DataError for damaged tokens."""
        epochs, places = np.divmod(cursors, self.n_rows)
        return self.rows(permuted(places, self.n_rows, self._seed, epochs))

    def rows(self, numbers: np.ndarray) -> Rows:
        """The rows of these numbers (int64 [B]); beyond the last there is padding alone."""
        tokens_BU = np.zeros((len(numbers), self._size), self._split.dtype)
        segments_BU = np.full(tokens_BU.shape, -1, np.int32)
        weights_BU = np.zeros(tokens_BU.shape, np.float32)
        known = numbers[numbers < self.n_rows]
        if not len(known):
            return tokens_BU, segments_BU, weights_BU
        counts = self._row_starts[known + 1] - self._row_starts[known]
        documents = self._documents[spans(self._row_starts[known], counts)]
        starts = self._split.document_starts[documents]
        lengths = self._split.document_starts[documents + 1] - starts
        first = np.repeat(np.cumsum(counts) - counts, counts)  # of its row's documents, among all of these
        before = np.cumsum(lengths) - lengths
        row = np.repeat(np.flatnonzero(numbers < self.n_rows), counts)
        where = spans(row * self._size + before - before[first], lengths)
        tokens_BU.ravel()[where] = self._split.take(starts, lengths)
        segments_BU.ravel()[where] = np.repeat(np.arange(len(documents)) - first, lengths)
        weights_BU.ravel()[where] = self._split.weights(starts, lengths)
        return tokens_BU, segments_BU, weights_BU


def pack(lengths: np.ndarray, size: int) -> np.ndarray:
    """Which row of `size` tokens each document of these lengths goes into, int64; rows are numbered from 0."""
    rows = np.zeros(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(size + 1)]
    rooms = 0  # bit n: there is a row with room for n tokens and no more
    n_rows = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1  # the least that is enough
            row = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
        else:
            room, row, n_rows = size, n_rows, n_rows + 1
        rows[document] = row
        with_room[room - length].append(row)
        rooms |= 1 << room - length
    return rows


def packed_batches(split: TokenSplit, seq_len: int, batch_size: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
    """The whole split once, for evaluation, and padding up to a whole batch.

    Rows come in an order that nothing changes, drawn so that the first batches are a fair sample: rows are numbered
    with the longest documents first. Every token that is scored is a target exactly once, but for the first of a
    document, and with weight 1, whatever it counts in training: so bits per byte are those of a text. `rows` are the
    numbers of those rows of a batch that this process makes, in ascending order; all by default.
    """
    packed = PackedRows(split, seq_len)
    rows = np.arange(batch_size) if rows is None else rows
    for low in range(0, packed.n_rows, batch_size):
        numbers = low + rows
        tokens_BU, segments_BU, weights_BU = packed.rows(drawn(numbers, packed.n_rows))
        yield as_batch(tokens_BU, segments_BU, numbers, "whole", weights_BU > 0)
