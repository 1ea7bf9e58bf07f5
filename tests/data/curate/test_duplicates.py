"""Duplicates: found as by comparing all with all, validation kept, nothing else touched."""

import itertools
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.data.curate.document import Changed, Dropped
from lmjax.data.curate.duplicates import ExactDuplicates, RepeatedParts
from lmjax.data.curate.equal import Clusters, shared
from lmjax.data.curate.near_duplicates import NearDuplicates, shingles
from lmjax.data.curate.step import Column
from tests.data.curate.conftest import documents, run_pass, text_of

rows = st.lists(st.lists(st.integers(0, 12), max_size=4), min_size=1, max_size=12)


@given(rows=rows, chunk=st.integers(1, 5), most=st.sampled_from([1, 3, 1000]))
def test_shared_keys_are_those_of_several_documents(rows: list[list[int]], chunk: int, most: int) -> None:
    """However the keys lie in files, and in however many parts they are sorted."""
    values = [np.array(row, np.uint64) for row in rows]
    parts = [np.concatenate(values[start : start + chunk]) for start in range(0, len(values), chunk)]
    found = {key: where.tolist() for key, where in shared(Column(parts, np.cumsum([len(row) for row in rows])), most)}
    expected = defaultdict(set)
    for number, row in enumerate(rows):
        for key in row:
            expected[key].add(number)
    assert found == {key: sorted(where) for key, where in expected.items() if len(where) > 1}


@given(
    held=st.lists(st.booleans(), min_size=1, max_size=10),
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8),
)
def test_of_each_cluster_one_is_kept_and_validation_before_training(
    held: list[bool], pairs: list[tuple[int, int]]
) -> None:
    clusters = Clusters(np.array(held))
    pairs = [(a % len(held), b % len(held)) for a, b in pairs]
    for pair in pairs:
        clusters.join(pair)
    groups = [{n} for n in range(len(held))]
    for a, b in pairs:
        joined = groups[a] | groups[b]
        for n in joined:
            groups[n] = joined
    for n, (verdict, group) in enumerate(zip(clusters.verdicts(), groups, strict=True)):
        kept = min(group, key=lambda one: (not held[one], one))
        assert verdict == (0 if n == kept else 2 if held[kept] and not held[n] else 1)
    sizes = [len(group) for group in {frozenset(group) for group in groups} if len(group) > 1]
    assert clusters.sizes() == {str(size): sizes.count(size) for size in sorted(set(sizes))}


def test_exact_duplicates_keep_the_first_or_the_one_for_validation() -> None:
    texts = ["A b, c.", "other", "a  B c", "?!", "other", "!?", "A b, c."]
    kept = [text_of(outcome) for outcome in run_pass(ExactDuplicates(), documents(texts, frozenset({4})))]
    assert kept == ["A b, c.", None, None, "?!", "other", "!?", None]
    outcomes = run_pass(ExactDuplicates(normalized=False), documents(texts, frozenset({4})))
    assert [text_of(outcome) for outcome in outcomes] == ["A b, c.", None, "a  B c", "?!", "other", "!?", None]
    assert outcomes[1] == Dropped("a duplicate of a document for validation")


MENU = "Home and news and shop and contact"


@pytest.mark.parametrize(("keep_first", "most"), [(True, 1), (False, 1), (False, 2)])
def test_shared_lines_go_and_all_other_text_stays(keep_first: bool, most: int) -> None:
    texts = [f"{MENU}\n\nStory {n}, told at some length.\nShort\n{MENU}" for n in range(3)] + ["Short\n  alone  \n"]
    step = RepeatedParts(part="line", most=most, keep_first=keep_first)
    outcomes = run_pass(step, documents(texts, frozenset({1})), chunk=2)
    stripped = [text.replace(f"{MENU}\n", "").replace(MENU, "") for text in texts]
    expected = [texts[n] if keep_first and n == 1 else stripped[n] for n in range(3)] + [texts[3]]
    assert [text_of(outcome) for outcome in outcomes] == expected
    assert isinstance(outcomes[0], Changed) and outcomes[0].what == ("a repeated line",) * 2


def test_shared_paragraphs_go() -> None:
    licence = "This text is free\nfor all to read."
    texts = [f"{licence}\n \nBook {n} begins\nhere.\n\n\n{licence}" for n in range(2)] + [licence]
    outcomes = run_pass(RepeatedParts(keep_first=False), documents(texts))
    assert [text_of(outcome) for outcome in outcomes] == [f"Book {n} begins\nhere.\n\n\n" for n in range(2)] + [None]
    assert run_pass(RepeatedParts(most=3), documents(texts)) == documents(texts)


def jaccard(one: str, other: str) -> float:
    a, b = (set(shingles(text, 5).tolist()) for text in (one, other))
    return len(a & b) / len(a | b)


def test_near_duplicates_are_found_as_by_comparing_all_pairs(sentences: Callable[[int, int], str]) -> None:
    pytest.importorskip("rensa")
    rng = np.random.default_rng(3)
    texts = []
    for seed in range(30):
        words = sentences(30, seed).split()
        texts.append(" ".join(words))
        for changes in (1, 4, 8, 16):  # similarities from nearly 1 down to about 0.5
            copy = list(words)
            for place in rng.choice(len(words), changes, replace=False):
                copy[place] = f"new{rng.integers(10**6)}"
            texts.append(" ".join(copy))
    step = NearDuplicates()
    outcomes = run_pass(step, documents(texts), chunk=7)
    pairs = [(a, b) for a, b in itertools.combinations(range(len(texts)), 2)
             if a // 5 == b // 5 and jaccard(texts[a], texts[b]) >= step.threshold]  # fmt: skip
    clusters = Clusters(np.zeros(len(texts), bool))
    for pair in pairs:
        clusters.join(pair)
    expected = clusters.verdicts() > 0
    assert 20 < expected.sum() < 110
    assert [text_of(outcome) is None for outcome in outcomes] == expected.tolist()


@pytest.mark.parametrize("text", ["", "one", "one two", "!!", "یک دو سه"])
def test_short_texts_are_near_duplicates_of_themselves_alone(text: str) -> None:
    pytest.importorskip("rensa")
    outcomes = run_pass(NearDuplicates(), documents([text, "another text", text]))
    assert [text_of(outcome) is None for outcome in outcomes] == [False, False, True]


def test_what_is_near_to_validation_is_not_trained_on(sentences: Callable[[int, int], str]) -> None:
    pytest.importorskip("rensa")
    text = sentences(30, 1)
    words = text.split()
    near = " ".join([*words[:100], "other", *words[101:]])
    outcomes = run_pass(NearDuplicates(), documents([near, sentences(30, 2), text, near], frozenset({2})))
    assert [text_of(outcome) for outcome in outcomes] == [None, sentences(30, 2), text, None]
    assert outcomes[0] == outcomes[3] == Dropped("a near duplicate of a document for validation")
