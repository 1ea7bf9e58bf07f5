"""Numbers of all items, of categories and their means; two models side by side; an untrained one is at chance."""

import json
import math
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.evaluate.requests import Scorer
from lmjax.evaluate.tasks.benchmark import Benchmark, prompts
from lmjax.evaluate.tasks.forms import Answer, MultipleChoice
from lmjax.evaluate.tasks.prompt import Item, Prompt
from lmjax.evaluate.tasks.registry import BENCHMARKS
from lmjax.evaluate.tasks.results import ALL, MACRO, Result, answer, as_json
from lmjax.evaluate.tasks.table import table
from lmjax.weights import initialize
from tests.evaluate.tasks.test_benchmark import DATA

pytestmark = pytest.mark.usefixtures("quick_compilation")


def result(rights: dict[str, list[float]], nll: float = 2.0) -> Result:
    """Answers by category, as if a model had given them."""
    items = [(category, right) for category, of in rights.items() for right in of]
    asked = [Prompt(n, Item("q", ("a",), 0, category), "q", " ") for n, (category, _) in enumerate(items)]
    scores = [{"acc": (right, 1.0), "nll": (nll * (2 + n), 2.0 + n)} for n, (_, right) in enumerate(items)]
    return Result(asked, [Answer(score, {"said": n}) for n, score in enumerate(scores)], "same")


def test_items_categories_and_their_mean() -> None:
    found = result({"b": [1, 0, 0, 0], "a": [1, 1]}).numbers()["acc"]
    assert list(found) == [ALL, MACRO, "a", "b"]
    assert [round(one.value, 6) for one in found.values()] == [0.5, 0.625, 1.0, 0.25]
    assert [one.items for one in found.values()] == [6, 6, 2, 4]
    assert found["b"].stderr == pytest.approx(0.25) and found[MACRO].stderr == pytest.approx(0.125)


def test_without_categories_there_is_one_number() -> None:
    assert list(result({"": [1, 0]}).numbers()["acc"]) == [ALL]


def test_perplexity_is_the_exponential_of_nll() -> None:
    found = result({"": [1, 0, 1]}).numbers()
    assert found["nll"][ALL].value == pytest.approx(2.0)
    assert found["perplexity"][ALL].value == pytest.approx(math.exp(2.0))
    assert found["perplexity"][ALL].stderr == pytest.approx(math.exp(2.0) * found["nll"][ALL].stderr)


def test_two_models() -> None:
    first, second = result({"a": [1, 1, 1, 0], "b": [1, 1]}), result({"a": [0, 1, 0, 0], "b": [1, 0]}, nll=2.5)
    found = first.less(second)
    assert found["acc"][ALL].value == pytest.approx(0.5) and found["acc"][MACRO].value == pytest.approx(0.5)
    assert found["nll"][ALL].value == pytest.approx(-0.5)
    tests = first.disagreements(second)
    assert tests.keys() == {"acc"} and tests["acc"] == (3, 0, 0.25)
    lines = table({"sums": first}, {"sums": second})
    assert lines[0].split() == [
        "benchmark",
        "metric",
        "value",
        "+-",
        "items",
        "other",
        "+-",
        "difference",
        "95%",
        "interval",
        "McNemar",
        "p",
    ]
    assert lines[1].split()[:6] == ["sums", "acc", "0.8333", "0.1667", "6", "0.3333"]
    assert lines[1].split()[-1] == "0.25" and lines[2].split()[2] == MACRO
    assert not any("perplexity" in line and "[" in line for line in lines)


def test_tokens_of_other_tokenizers_are_not_compared() -> None:
    first = result({"": [1, 0, 1]})
    more = [one._replace(scores={**one.scores, "nll": (4.0, 5.0)}) for one in first.answers]
    found = first.less(first._replace(answers=more))
    assert found.keys() == {"acc"}
    lines = table({"sums": first}, {"sums": first._replace(answers=more)})
    assert not any(" nll " in line and "[" in line for line in lines) and any(" nll " in line for line in lines)


def test_the_table_says_what_was_not_read() -> None:
    found = result({"a": [1.0], "b": [0, 1]})
    assert "nan" not in "\n".join(table({"sums": found}))
    cut = found._replace(answers=[found.answers[0]._replace(unread=3), *found.answers[1:]])
    assert table({"sums": cut})[-1].startswith("sums: 1 of 3 questions are longer than what the model reads")


def test_as_json_has_no_nan() -> None:
    plain = as_json(result({"a": [1.0], "b": [1, 0]}).numbers())
    low = pytest.approx(0.2065, abs=1e-4)
    assert plain["acc"]["a"] == {"value": 1.0, "stderr": None, "low": low, "high": 1.0, "items": 1}
    assert plain["nll"]["a"] == {"value": 2.0, "stderr": None, "low": None, "high": None, "items": 1}
    json.dumps(plain, allow_nan=False)
    assert plain["acc"]["all"]["items"] == 3


def test_records_tell_every_item() -> None:
    found = result({"a": [1, 0]}).records()
    assert found[1] == {"number": 1, "category": "a", "said": 1, "scores": {"acc": [0, 1.0], "nll": [6.0, 3.0]}}


def test_digests_name_what_was_asked(scorer: Scorer, tmp_path: Path) -> None:
    benchmark = Benchmark("q.jsonl", lambda line: Item(line["q"], ("yes", "no"), line["gold"]), MultipleChoice())
    records = [{"q": f"is {n} even?", "gold": n % 2} for n in range(6)]

    def digest(records: list[dict], **options: int) -> str:
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return answer(benchmark, scorer, prompts(benchmark, tmp_path, **options)).digest

    first = digest(records)
    assert digest(records) == first
    others = [digest(records[1:]), digest(records, limit=3), digest(records, shots=1)]
    others.append(digest([{**records[0], "gold": 1}, *records[1:]]))
    assert len({first, *others}) == 5


# At chance --------------------------------------------------------------------------------------------------------


def at_chance(found: Result) -> None:
    """Every accuracy is within two standard errors of a guess."""
    chance = np.mean([1 / len(prompt.item.choices) for prompt in found.prompts])
    for metric, by in found.numbers().items():
        if metric.startswith("acc"):
            assert abs(by[ALL].value - chance) < 2 * by[ALL].stderr, (metric, by[ALL], chance)


def test_an_untrained_model_is_at_chance(scorer: Scorer, tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    with open(tmp_path / "made.jsonl", "w") as file:
        for n in range(240):
            line = {"q": f"Question: {rng.choice(words)} {rng.choice(words)}?\nAnswer:", "a": rng.sample(words, 4)}
            file.write(json.dumps(line | {"gold": rng.randrange(4), "of": f"part {n % 3}"}) + "\n")
    made = Benchmark(
        "made.jsonl",
        lambda line: Item(line["q"], tuple(line["a"]), line["gold"], line["of"]),
        MultipleChoice(unconditional="Answer:"),
    )
    found = answer(made, scorer, prompts(made, tmp_path))
    at_chance(found)
    assert len(found.numbers()["acc"]) == 2 + 3 and found.unread == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["piqa", "arc_easy", "hellaswag", "mmlu"])
def test_an_untrained_model_is_at_chance_on_real_questions(name: str, scorer: Scorer) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}")
    fresh = scorer._replace(params=initialize(scorer.model.spec, jax.random.key(3)), context=1024, batch=16)
    at_chance(answer(BENCHMARKS[name], fresh, prompts(BENCHMARKS[name], DATA, shots=0, limit=400)))
