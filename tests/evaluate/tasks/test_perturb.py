"""Questions asked otherwise: what changes, what does not, and that it is the same every time."""

import random

import pytest

from lmjax.errors import ConfigError
from lmjax.evaluate.tasks.perturb import PERTURBATIONS, perturbed, typos
from lmjax.evaluate.tasks.prompt import Item, Prompt
from lmjax.tasks.benchmarks import asked_otherwise
from lmjax.train.config import EvaluationsConfig
from tests.evaluate.tasks.test_benchmark import DATA

TEXT = "Question: Which of these is a Source of energy for nearly all ecosystems?\nAnswer:" * 3
BEFORE = "An Example of Before.\n\n"
ASKED = [Prompt(n, Item(f"{n} {TEXT}", ("Yes", "No"), n % 2), f"{BEFORE}{n} {TEXT}", " ") for n in range(20)]


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_only_the_question_changes(name: str) -> None:
    changed = perturbed(ASKED, name, seed=1)
    assert changed == perturbed(ASKED, name, seed=1) == perturbed(ASKED[::-1], name, seed=1)[::-1]
    for before, after in zip(ASKED, changed, strict=True):
        assert after.item.context != before.item.context
        assert after.context == BEFORE + after.item.context
        assert after.continuations == before.continuations and after.number == before.number
    if name != "typos":
        assert [one.item.context for one in changed] == [getattr(one.item.context, name)() for one in ASKED]


def test_typos_are_few_errors_of_typing() -> None:
    texts = [typos(TEXT, random.Random(seed)) for seed in range(200)]
    letters = sum(letter.isalpha() for letter in TEXT)
    wrong = [sum(a != b for a, b in zip(TEXT, text, strict=False)) > 0 for text in texts]
    assert len(set(texts)) > 190 and sum(wrong) > 190
    assert sum(map(len, texts)) / len(texts) == pytest.approx(len(TEXT), abs=0.02 * letters)
    other = [[c for c in text if not c.isalpha()] for text in texts]
    assert all(rest == [c for c in TEXT if not c.isalpha()] for rest in other)
    assert perturbed(ASKED, "typos", seed=1) != perturbed(ASKED, "typos", seed=2)


def test_other_words_ask_the_same_questions() -> None:
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}")
    cfg = EvaluationsConfig(tasks=("piqa", "arc_easy", "lambada"), data=str(DATA), limit=20, shots=1)
    for name, (plain, others) in asked_otherwise(cfg, ["reworded", "lower"]).items():
        assert [*others] == (["lower"] if name == "lambada" else ["lower", "reworded 1", "reworded 2"])
        for other in others.values():
            pairs = list(zip(plain.prompts, other.prompts, strict=True))
            for a, b in pairs:
                assert (a.number, a.item.gold, a.item.choices) == (b.number, b.item.gold, b.item.choices)
                assert a.context != b.context


def test_what_cannot_be_asked_otherwise() -> None:
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}")
    cfg = EvaluationsConfig(tasks=("hellaswag",), data=str(DATA), limit=3)
    with pytest.raises(ConfigError, match="none of hellaswag has other words"):
        asked_otherwise(cfg, ["reworded"])
    with pytest.raises(ConfigError, match="--perturb=typo is not known; choose of typos, lower, upper, reworded"):
        asked_otherwise(cfg, ["typo"])
