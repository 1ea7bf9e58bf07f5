"""Documents for the tests of curation."""

from collections.abc import Callable

import numpy as np
import pytest

from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.step import Column, CorpusStep, Keys

Texts = list[str | None]


@pytest.fixture
def sentences() -> Callable[[int, int], str]:
    """sentences(number, seed): so many of 5 to 14 invented words, never the same."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(2000)]

    def make(number: int, seed: int) -> str:
        own = np.random.default_rng([1, seed])
        lengths = own.integers(5, 15, number)
        return " ".join(" ".join(own.choice(vocabulary, length)).capitalize() + "." for length in lengths)

    return make


def documents(texts: list[str], held_out: frozenset[int] = frozenset()) -> list[Document]:
    """Documents of these texts; those of some numbers are for validation."""
    split = ("train", "valid")
    return [Document(text, f"s/{n}", "s", {"split": split[n in held_out]}) for n, text in enumerate(texts)]


def text_of(outcome: Outcome) -> str | None:
    """The text that a step left, or None where it dropped the document."""
    if isinstance(outcome, Dropped):
        return None
    return outcome.document.text if isinstance(outcome, Changed) else outcome.text


def run_pass(step: CorpusStep, given: list[Document], chunk: int = 3) -> list[Outcome]:
    """A pass over documents, their keys in chunks as they come from disk."""
    key = step.keys()
    made = [key(document) for document in given]
    columns = {}
    for name in made[0]:
        values = [one[name] for one in made]
        parts = [np.concatenate(values[start : start + chunk]) for start in range(0, len(values), chunk)]
        columns[name] = Column(parts, np.cumsum([len(value) for value in values]))
    learned = step.decide(Keys(columns, np.array([document.held_out for document in given], bool)))
    judge = step.judge(learned.arrays)
    return [judge(number, document) for number, document in enumerate(given)]
