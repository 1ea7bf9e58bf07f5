"""Windows: every token once an epoch, targets right, documents apart, evaluation complete."""

import collections
import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lmjax.data.store.dataset import open_dataset
from lmjax.data.windows import Windows, as_batch, document_batches, evaluation_batches, subset
from lmjax.errors import DataError

END = 256


class SplitInMemory:
    """Documents of any tokens as a split."""

    def __init__(self, documents):
        self.tokens = np.concatenate(documents).astype(np.uint16)
        self.document_starts = np.cumsum([0] + [len(document) for document in documents])
        self.n_tokens, self.n_documents = len(self.tokens), len(documents)
        self.dtype = self.tokens.dtype

    def take(self, starts, lengths):
        return np.concatenate([self.tokens[a : a + n] for a, n in zip(starts, lengths, strict=True)])


def numbered(lengths):
    """Documents in which every token is its own number: what was read can be counted."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]


lengths_lists = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_lists, seq_len=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_every_target_comes_once_an_epoch(lengths, seq_len, seed, data):
    split = SplitInMemory(numbered(lengths))
    if split.n_tokens <= seq_len:
        return
    windows = Windows(split, seq_len, seed, "joined")
    epoch = data.draw(st.integers(0, 3))
    tokens, _ = windows.read(np.arange(epoch * windows.n_windows, (epoch + 1) * windows.n_windows))
    targets = collections.Counter(tokens[:, 1:].ravel().tolist())
    assert set(targets.values()) == {1} and len(targets) == windows.n_windows * seq_len
    assert split.n_tokens - 1 - len(targets) < seq_len  # the tail that is left out
    # Neighbouring tokens are neighbours of a document, or the end of one and the start of another.
    starts, ends = set(split.document_starts[:-1].tolist()), set((split.document_starts[1:] - 1).tolist())
    for row in tokens.tolist():
        for a, b in itertools.pairwise(row):
            assert b == a + 1 or (a in ends and b in starts)


@settings(max_examples=200, deadline=None)
@given(lengths=lengths_lists, seq_len=st.integers(1, 20), data=st.data())
def test_reading_is_a_pure_function_of_the_cursor(lengths, seq_len, data):
    split = SplitInMemory(numbered([*lengths, 21]))
    for documents in ("joined", "separate"):
        windows = Windows(split, seq_len, 5, documents)
        cursors = np.array(data.draw(st.lists(st.integers(0, 5 * windows.n_windows), min_size=1, max_size=20)))
        tokens, segments = windows.read(cursors)
        fresh = Windows(split, seq_len, 5, documents)
        for row in range(len(cursors)):
            one_token, one_segment = fresh.read(cursors[row : row + 1])
            assert np.array_equal(tokens[row], one_token[0]) and np.array_equal(segments[row], one_segment[0])


def test_how_many_windows_are_looked_up_at_a_time_changes_nothing(monkeypatch):
    split, cursors = SplitInMemory(numbered([3, 50, 1, 9, 20])), np.random.default_rng(0).permutation(99)
    expected = Windows(split, 4, 5, "separate").read(cursors)
    for block in (1, 7, 20):  # an epoch has 20 windows
        monkeypatch.setattr("lmjax.data.windows._BLOCK", block)
        found = Windows(split, 4, 5, "separate").read(cursors)
        assert all(map(np.array_equal, found, expected))


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_lists, seq_len=st.integers(1, 20))
def test_separate_documents_are_told_apart(lengths, seq_len):
    split = SplitInMemory(numbered([*lengths, 21]))
    windows = Windows(split, seq_len, 0, "separate")
    cursors = np.arange(windows.n_windows)
    batch = as_batch(*windows.read(cursors), cursors, "separate")
    document_of = np.searchsorted(split.document_starts, np.arange(split.n_tokens), side="right") - 1
    same = document_of[batch.tokens_BT] == document_of[batch.targets_BT]
    follows = batch.targets_BT == batch.tokens_BT + 1
    assert np.array_equal(batch.weights_BT, (same & follows).astype(np.float32))
    new_document = np.diff(batch.segments_BT, axis=1) == 1
    assert np.array_equal(
        new_document, ~(np.diff(batch.tokens_BT, axis=1) == 1) | (np.diff(document_of[batch.tokens_BT]) != 0)
    )
    for segments, positions in zip(batch.segments_BT, batch.positions_BT, strict=True):
        assert segments[0] == 0
        for segment in np.unique(segments):
            assert np.array_equal(positions[segments == segment], np.arange((segments == segment).sum()))


@settings(max_examples=100, deadline=None)
@given(lengths=lengths_lists, seq_len=st.integers(1, 8), seed=st.integers(0, 99), data=st.data())
def test_a_limit_reads_whole_documents_of_about_so_many_tokens_over_and_over(lengths, seq_len, seed, data):
    split = SplitInMemory(numbered(lengths))
    limit = data.draw(st.integers(1, split.n_tokens))
    chosen = subset(split, limit)
    assert len(set(chosen)) == len(chosen)
    assert limit <= sum(lengths[i] for i in chosen) < limit + lengths[chosen[-1]]
    fewer = subset(split, data.draw(st.integers(1, limit)))
    assert fewer.tolist() == chosen[: len(fewer)].tolist()
    owned = {token for i in chosen for token in range(*split.document_starts[i : i + 2])}
    if len(owned) <= seq_len:
        return
    windows = Windows(split, seq_len, seed, "joined", limit)
    assert windows.n_tokens == len(owned)
    for epoch in range(2):
        tokens, _ = windows.read(np.arange(epoch * windows.n_windows, (epoch + 1) * windows.n_windows))
        targets = tokens[:, 1:].ravel().tolist()
        assert len({*targets}) == len(targets) and {*tokens.ravel().tolist()} <= owned
        assert len(owned) - 1 - len(targets) < seq_len


def test_epochs_are_ordered_anew_and_by_the_seed():
    split = SplitInMemory(numbered([7] * 50))
    orders = [
        Windows(split, 6, seed, "joined").read(np.arange(58) + 58 * epoch)[0].tobytes()
        for seed in (0, 1)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 6


def test_golden_stream(prepared):
    """Three documents, from text to batch."""
    path = prepared(["abc", "DEFG", "hi"])
    split = open_dataset(path).split("train")
    windows = Windows(split, split.n_tokens - 1, 0, "separate")
    batch = as_batch(*windows.read(np.array([0])), np.array([0]), "separate")
    row = [*batch.tokens_BT[0], batch.targets_BT[0, -1]]
    assert np.array_equal(batch.targets_BT[0, :-1], batch.tokens_BT[0, 1:])
    documents = bytes(token if token != END else ord("|") for token in row).decode()
    assert sorted(documents.split("|")) == ["", "DEFG", "abc", "hi"] and documents[-1] == "|"
    crossing = [place for place, token in enumerate(row[:-1]) if token == END]
    assert np.flatnonzero(batch.weights_BT[0] == 0).tolist() == crossing and len(crossing) == 2
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == batch.segments_BT.dtype == np.int32
    assert batch.weights_BT.dtype == np.float32


def test_joined_documents_are_one_stream():
    split = SplitInMemory(numbered([5, 6, 7]))
    batch = as_batch(*Windows(split, 4, 0, "joined").read(np.arange(3)), np.arange(3) + (1 << 31), "joined")
    assert batch.segments_BT is None and batch.positions_BT is None
    assert (batch.weights_BT == 1).all() and batch.ids_B.tolist() == [0, 1, 2]


def test_too_little_text_for_one_window(prepared):
    split = open_dataset(prepared(["abc"])).split("train")
    with pytest.raises(DataError, match=r"4 tokens in .* do not make one window of data.seq_len=4"):
        Windows(split, 4, 0, "joined")
    assert Windows(split, 3, 0, "joined").n_windows == 1


@settings(max_examples=150, deadline=None)
@given(
    lengths=lengths_lists,
    seq_len=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    documents=st.sampled_from(["joined", "separate"]),
)
def test_evaluation_scores_every_target_once(lengths, seq_len, batch_size, documents):
    split = SplitInMemory(numbered(lengths))
    batches = list(evaluation_batches(split, seq_len, batch_size, documents))
    assert all(batch.tokens_BT.shape == (batch_size, seq_len) for batch in batches)
    scored = [batch.targets_BT[batch.weights_BT > 0] for batch in batches]
    firsts = split.document_starts[:-1] if documents == "separate" else [0]
    expected = np.setdiff1d(np.arange(split.n_tokens), firsts)
    assert np.array_equal(np.sort(np.concatenate([[], *scored])), expected)
    for batch in batches:
        inputs, targets = batch.tokens_BT[batch.weights_BT > 0], batch.targets_BT[batch.weights_BT > 0]
        assert np.array_equal(inputs + 1, targets)
        assert set(np.unique(batch.weights_BT)) <= {0, 1}
    assert [row for batch in batches for row in batch.ids_B] == list(range(len(batches) * batch_size))


def test_the_first_batches_of_an_evaluation_are_a_fair_sample():
    """Of 50 documents of 40 tokens, in windows of 8, 5 batches of 10 see most; what is padded comes last."""
    split = SplitInMemory(numbered([40] * 50))
    batches = list(evaluation_batches(split, 8, 10, "joined"))
    seen = {target // 40 for batch in batches[:5] for target in batch.targets_BT[:, 0]}
    assert len(seen) > 25
    unscored = [int((batch.weights_BT == 0).sum()) for batch in batches]
    assert unscored[-1] > 0 and not any(unscored[:-1])


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    seq_len=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    whole=st.booleans(),
)
def test_documents_by_themselves_are_read_from_their_start(lengths, seq_len, batch_size, whole):
    begin_id = 9999
    documents = [np.append(document, END) for document in numbered(np.array(lengths))]
    split = SplitInMemory([document + (document != END) * 300 for document in documents])
    batches = list(document_batches(split, seq_len, batch_size, begin_id, whole=whole))
    assert all(batch.tokens_BT.shape == (batch_size, seq_len) for batch in batches)
    rows = [
        (tokens[weights > 0].tolist(), targets[weights > 0].tolist())
        for batch in batches
        for tokens, targets, weights in zip(batch.tokens_BT, batch.targets_BT, batch.weights_BT, strict=True)
    ]
    expected = []
    for start, end in itertools.pairwise(split.document_starts):
        text = split.tokens[start : end - 1].tolist()
        pieces = [text[at : at + seq_len] for at in range(0, len(text), seq_len)]
        expected += [([begin_id, *piece[:-1]], piece) for piece in (pieces if whole else pieces[:1])]
    assert [row for row in rows if row[1]] == expected
    assert [row for batch in batches for row in batch.ids_B] == list(range(len(batches) * batch_size))
