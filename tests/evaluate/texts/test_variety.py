"""Repetition by hand."""

import pytest

from lmjax.evaluate.texts.variety import distinct, ngrams, repetition, self_bleu


def test_ngrams() -> None:
    assert ngrams("a b  c\nd", 2) == [("a", "b"), ("b", "c"), ("c", "d")]
    assert ngrams("a b", 3) == []


def test_distinct_counts_all_texts_together() -> None:
    assert distinct(["a b", "a c"], 1) == 3 / 4 and distinct(["a b", "a c"], 2) == 1
    assert distinct(["a b", "a b"], 2) == 1 / 2
    assert distinct(["a", ""], 2) == 0


def test_repetition_within_a_text() -> None:
    assert repetition("a b c d", 4) == 0 and repetition("a b", 4) == 0
    assert repetition("a a a a a", 2) == 3 / 4
    assert repetition("to be or not to be", 2) == pytest.approx(1 / 5)


def test_texts_that_say_the_same() -> None:
    pytest.importorskip("sacrebleu")
    same = ["the cat sat on the mat"] * 3
    other = [*same[:2], "a dog runs in our park"]
    assert self_bleu(same) == pytest.approx(100)
    assert self_bleu(other) == pytest.approx(200 / 3, abs=3)
    assert self_bleu(["one two three four", "five six seven eight"]) < 10
