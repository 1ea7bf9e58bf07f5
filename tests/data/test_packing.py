"""Rows of whole documents: each once an epoch, uncut and apart, in few rows; any sample by itself."""

import collections

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lmjax.data.packing import PackedRows, pack, packed_batches
from lmjax.data.windows import as_batch
from lmjax.errors import DataError


class SplitInMemory:
    """Documents whose tokens are numbered through, from 1; every third is scored, and never a document's first."""

    def __init__(self, lengths):
        self.document_starts = np.cumsum([0, *lengths])
        self.n_tokens, self.n_documents = int(sum(lengths)), len(lengths)
        self.dtype = np.dtype(np.uint16)
        self.bits = np.arange(self.n_tokens) % 3 == 0
        self.bits[self.document_starts[:-1]] = False

    def take(self, starts, lengths):
        return np.concatenate([np.arange(a, a + n) + 1 for a, n in zip(starts, lengths, strict=True)])

    def weights(self, starts, lengths):
        return np.concatenate([self.bits[a : a + n] for a, n in zip(starts, lengths, strict=True)])


lengths_lists = st.lists(st.integers(1, 12), min_size=1, max_size=40)


@given(lengths=lengths_lists, seq_len=st.integers(11, 30), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=100)
def test_every_document_comes_whole_and_once_an_epoch(lengths, seq_len, seed, data):
    split = SplitInMemory(lengths)
    packed = PackedRows(split, seq_len, seed)
    epoch = data.draw(st.integers(0, 3))
    cursors = np.arange(epoch * packed.n_rows, (epoch + 1) * packed.n_rows)
    tokens_BU, segments_BU, scored_BU = packed.read(cursors)
    found = collections.Counter()
    for tokens, segments in zip(tokens_BU, segments_BU, strict=True):
        used = int((segments >= 0).sum())
        assert (segments[used:] == -1).all() and (tokens[used:] == 0).all()
        assert (np.diff(segments[:used]) >= 0).all() and segments[0] == 0
        for segment in range(segments.max() + 1):
            found[tuple(tokens[segments == segment].tolist())] += 1
    starts, ends = split.document_starts[:-1], split.document_starts[1:]
    assert found == {tuple(range(a + 1, b + 1)): 1 for a, b in zip(starts, ends, strict=True)}
    assert np.array_equal(scored_BU, np.append(False, split.bits)[tokens_BU])
    batch = as_batch(tokens_BU, segments_BU, cursors, "whole", scored_BU)
    assert batch.weights_BT.sum() == split.bits.sum()
    weighed = batch.weights_BT > 0
    assert (batch.targets_BT[weighed] == batch.tokens_BT[weighed] + 1).all()
    assert (batch.positions_BT[batch.segments_BT < 0] == -1).all()
    assert (batch.positions_BT[:, 0] == 0).all() and (batch.positions_BT[weighed] >= 0).all()


@given(lengths=lengths_lists, seq_len=st.integers(11, 20), data=st.data())
@settings(max_examples=50)
def test_reading_is_a_pure_function_of_the_cursor(lengths, seq_len, data):
    packed = PackedRows(SplitInMemory(lengths), seq_len, 5)
    cursors = np.array(data.draw(st.lists(st.integers(0, 5 * packed.n_rows), min_size=1, max_size=20)))
    together = packed.read(cursors)
    fresh = PackedRows(SplitInMemory(lengths), seq_len, 5)
    for row, cursor in enumerate(cursors):
        for whole, one in zip(together, fresh.read(np.array([cursor])), strict=True):
            assert np.array_equal(whole[row], one[0])


@given(lengths=lengths_lists, size=st.integers(12, 30))
@settings(max_examples=100)
def test_no_two_rows_would_fit_into_one(lengths, size):
    rows = pack(np.array(lengths), size)
    filled = np.sort(np.bincount(rows, lengths))
    assert len(filled) == rows.max() + 1 and filled[-1] <= size
    assert len(filled) == 1 or filled[0] + filled[1] > size


def test_the_rows_of_a_hand_made_set():
    """7 + 3, 6 + 4 and 5 + 5 fill rows of ten."""
    assert pack(np.array([3, 7, 5, 4, 6, 5]), 10).tolist() == [0, 0, 2, 1, 1, 2]


def test_orders_differ_by_epoch_and_by_seed():
    orders = {
        PackedRows(SplitInMemory([12] * 20), 11, seed).read(np.arange(20) + 20 * epoch)[0].tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


@given(lengths=lengths_lists, batch_size=st.integers(1, 5))
@settings(max_examples=50)
def test_evaluation_scores_every_token_once(lengths, batch_size):
    split = SplitInMemory(lengths)
    batches = list(packed_batches(split, 14, batch_size))
    assert {batch.tokens_BT.shape for batch in batches} == {(batch_size, 14)}
    targets = np.concatenate([batch.targets_BT[batch.weights_BT > 0] for batch in batches])
    assert sorted(targets - 1) == np.flatnonzero(split.bits).tolist()
    some = list(packed_batches(split, 14, batch_size, np.array([0])))
    assert all(np.array_equal(one.tokens_BT[0], batch.tokens_BT[0]) for one, batch in zip(some, batches, strict=True))


def test_a_process_whose_rows_of_the_last_batch_are_all_beyond_the_end():
    split = SplitInMemory([5, 5, 5])
    batches = [list(packed_batches(split, 11, 4, rows)) for rows in (np.arange(0, 2), np.arange(2, 4))]
    assert [len(of_process) for of_process in batches] == [1, 1]
    scored = [batch.weights_BT.sum() for (batch,) in batches]
    assert scored[1] == 0 and scored[0] == split.bits.sum()


def test_the_first_batches_are_a_fair_sample():
    """Not those of the longest documents, which fill the first rows."""
    split = SplitInMemory([12] * 50 + [1] * 600)
    first = next(iter(packed_batches(split, 11, 25)))
    assert 0 < (first.segments_BT.max(axis=1) == 0).sum() < 25


def test_a_document_that_does_not_fit_is_named(prepared):
    from lmjax.data.store.dataset import open_dataset

    split = open_dataset(prepared(["short", "long enough"])).split("train")
    with pytest.raises(DataError, match=r"document 1 has 12 tokens, and .* a row holds 8: raise data.seq_len to 11"):
        PackedRows(split, 7)
