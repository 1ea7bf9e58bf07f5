"""What is held out is drawn by its text alone."""

from collections.abc import Callable

from lmjax.data.curate.document import Changed, Document
from lmjax.data.curate.held_out import HeldOut


def drawn(step: HeldOut, document: Document) -> bool:
    outcome = step.start({})(document)
    assert isinstance(outcome, Changed) and outcome.document.text == document.text
    assert outcome.found == (outcome.document.labels["split"],)
    return outcome.document.held_out


def test_a_share_is_drawn_and_equal_texts_fall_to_the_same_side(sentences: Callable[[int, int], str]) -> None:
    texts = [sentences(1, n) for n in range(2000)]
    first = [drawn(HeldOut(fraction=0.1), Document(text, f"a/{n}", "a")) for n, text in enumerate(texts)]
    assert 160 < sum(first) < 240  # 200, with a standard deviation of 13
    again = [drawn(HeldOut(fraction=0.1), Document(text, "other", "b")) for text in texts[:200]]
    assert again == first[:200]
    more = [drawn(HeldOut(fraction=0.2), Document(text, "a", "a")) for text in texts]
    assert all(after for before, after in zip(first, more, strict=True) if before)  # a larger share holds the smaller
    assert [drawn(HeldOut(fraction=0.1, seed=1), Document(text, "a", "a")) for text in texts] != first


def test_whole_sources_are_held_out(sentences: Callable[[int, int], str]) -> None:
    step = HeldOut(fraction=0.0, sources=("exam",))
    assert all(drawn(step, Document(sentences(1, n), "e", "exam")) for n in range(50))
    assert not any(drawn(step, Document(sentences(1, n), "b", "books")) for n in range(50))
