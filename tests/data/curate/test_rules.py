"""Each published rule drops the text that breaks it, and lets through what does not."""

from collections.abc import Callable

import pytest

from lmjax.data.curate.document import Changed, Document, Dropped
from lmjax.data.curate.quality_rules import Gopher, Repetition, duplicated
from lmjax.data.curate.web_rules import C4, FineWeb
from tests.data.curate.conftest import text_of

GOOD = "The master of the ship said to the men that they have to be brave, and with that he went below. "


def document(text: str) -> Document:
    return Document(text, "s/1", "s")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (GOOD * 5, ""),
        (GOOD * 2, "too few words"),
        (GOOD * 5001, "too many words"),
        (GOOD * 3 + "a b " * 400, "words too short or too long"),
        (GOOD * 3 + "incomprehensibilities " * 100, "words too short or too long"),
        (GOOD * 5 + "#hash " * 12, "too many symbols"),
        (GOOD * 5 + "so… " * 15, "too many symbols"),
        ("\n".join([f"- {GOOD}"] * 19 + [GOOD]), "too many bullets"),
        ("\n".join([f"- {GOOD}"] * 9 + [GOOD]), ""),
        ("\n".join([GOOD.strip() + "..", GOOD.strip() + "..", GOOD * 3]), "too many lines end in an ellipsis"),
        (GOOD * 3 + "1234 " * 16, "too few words with letters"),
        ("Sailors were brave during storms since winter. " * 12, "too few stop words"),
    ],
)
def test_gophers_rules_of_quality(text: str, why: str) -> None:
    assert Gopher().fault(text) == why


def distinct(words: int, start: int = 0) -> str:
    return " ".join(f"word{number:04d}" for number in range(start, start + words))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (distinct(500), ""),
        ("\n".join([distinct(9), distinct(9), *(distinct(9, 100 * n) for n in range(1, 11))]), ""),
        ("\n".join([distinct(9)] * 3 + [distinct(9, 100 * n) for n in range(1, 5)]), "repeated lines"),
        ("\n\n".join([distinct(20) + "\n" + distinct(9, 50)] * 3), "repeated lines"),
        (distinct(300) + " one two" * 200, "one run of 2 words again and again"),
        (distinct(300) + " aaa bbb ccc" * 70, "one run of 3 words again and again"),
        (distinct(100) + " " + distinct(30), "repeated runs of 5 words"),
        (distinct(100) + " " + distinct(10), ""),
    ],
)
def test_gophers_rules_of_repetition(text: str, why: str) -> None:
    assert Repetition().fault(text) == why


def test_what_is_repeated_is_what_was_there_before() -> None:
    assert duplicated(["ab", "c", "ab", "ab"]) == (0.5, 4 / 7)
    assert duplicated([]) == (0, 0)


def test_c4_keeps_the_lines_that_are_sentences(sentences: Callable[[int, int], str]) -> None:
    first, second = sentences(2, 1), sentences(2, 2)
    lines = [first, "Home | About | Contact us here now", "Too short.", "Please enable JavaScript to see this page.",
             "We use cookies, as our policy of data says.", second + "[12] So it is in the end.[citation needed]",
             "And so it went on..."]  # fmt: skip
    outcome = C4().apply(document("\n".join(lines)))
    assert isinstance(outcome, Changed) and outcome.document.text == f"{first}\n{second} So it is in the end."
    assert sorted(outcome.what) == [
        "a line about JavaScript",
        "a line about policies",
        "a line without a terminal mark",
        "a line without a terminal mark",
        "a short line",
    ]
    assert C4().apply(document(first + " " + second)) == document(first + " " + second)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (GOOD * 2, "too few sentences"),
        (GOOD * 5 + "Lorem ipsum dolor sit amet.", "lorem ipsum"),
        (GOOD * 5 + "if (a) { b(); }", "curly brackets"),
    ],
)
def test_c4_drops_pages(text: str, why: str) -> None:
    assert C4().apply(document(text)) == Dropped(why)


LINES = [f"{GOOD} {number}." for number in range(10)]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (LINES, ""),
        ([line.rstrip(".") + " and" for line in LINES[:9]] + LINES[:1], "few lines end in punctuation"),
        ([line.rstrip(".") + " and" for line in LINES[:8]] + LINES[8:], ""),
        ([*LINES, LINES[0], LINES[1]], "repeated lines"),
        (LINES[:1] + [f"Item {number}." for number in range(9)], "short lines"),
        (LINES[:4] + [f"Item {number}." for number in range(6)], ""),
        ([" "], "no lines"),
    ],
)
def test_finewebs_rules(lines: list[str], why: str) -> None:
    outcome = FineWeb().apply(document("\n".join(lines)))
    assert outcome == (Dropped(why) if why else document("\n".join(lines)))
    assert (text_of(outcome) is None) == bool(why)
