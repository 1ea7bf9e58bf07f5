"""What a model knows by heart is what it would write; pieces are drawn evenly from within documents."""

from typing import Any

import numpy as np
import pytest

from lmjax.errors import DataError
from lmjax.evaluate.memorization import Lengths, ask, drawn
from lmjax.evaluate.requests import Scorer
from lmjax.evaluate.tasks.results import ALL
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate_ids
from tests.evaluate.tasks.conftest import scorer as scorer

pytestmark = pytest.mark.usefixtures("quick_compilation")

END = 256
GREEDY = GenerateConfig(tokens=8, temperature=0, stop_at_endoftext=False)


class Documents:
    """What `drawn` reads of a split."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.ids = np.array([index for document in documents for index in [*document, END]])
        self.document_starts = np.cumsum([0, *(len(document) + 1 for document in documents)])

    def take(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.concatenate([self.ids[a : a + n] for a, n in zip(starts, lengths, strict=True)])


def split(documents: list[list[int]]) -> Any:
    return Documents(documents)


def test_every_piece_of_every_document_is_drawn_once() -> None:
    documents = [[1, 2, 3, 4, 5], [10, 11], [20, 21, 22, 23], [30, 31, 32]]
    found = drawn(split(documents), 3, count=100, seed=0, where="").tolist()
    assert found == [[1, 2, 3], [2, 3, 4], [3, 4, 5], [20, 21, 22], [21, 22, 23], [30, 31, 32]]
    times = np.zeros(40)
    for seed in range(600):
        for piece in drawn(split(documents), 3, count=2, seed=seed, where="").tolist():
            assert piece in found
            times[piece[0]] += 1
    assert times[[1, 2, 3, 20, 21, 30]] == pytest.approx(200, abs=60)  # five standard deviations
    assert np.array_equal(
        drawn(split(documents), 3, count=2, seed=7, where=""), drawn(split(documents), 3, count=2, seed=7, where="")
    )


def test_no_document_is_long_enough() -> None:
    with pytest.raises(DataError, match=r"no document of data/mine, train has 4 tokens; ask for fewer"):
        drawn(split([[1, 2, 3], []]), 4, count=5, seed=0, where="data/mine, train")


def test_memorized_is_what_greedy_decoding_writes(scorer: Scorer) -> None:
    prefixes = [list(range(65 + n, 77 + n)) for n in range(12)]
    written = generate_ids(scorer.model, scorer.params, prefixes, GREEDY, endoftext=END, vocab=257)
    assert all(END not in ids for ids in written), "it writes on, for this seed"
    wrong = [[*ids[:-1], ids[-1] ^ 1] for ids in written]
    texts = [*zip(prefixes[:9], written, strict=False), *zip(prefixes[9:], wrong[9:], strict=False)]
    found = ask(scorer, split([[*a, *b] for a, b in texts]), Lengths(12, 8), count=50, seed=0, where="")
    assert [one.scores["memorized"][0] for one in found.answers] == [1.0] * 9 + [0.0] * 3
    number = found.numbers()["memorized"][ALL]
    assert (number.value, number.items) == (0.75, 12) and 0.4 < number.low < 0.75 < number.high < 0.95
    assert [len(prompt.context) for prompt in found.prompts] == [12] * 12
