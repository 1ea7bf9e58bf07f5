"""From lines of a file to prompts: examples by seed, subsets by hash, and what is said of files that do not fit."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from lmjax.errors import ConfigError, DataError
from lmjax.evaluate.tasks.benchmark import Benchmark, prompts
from lmjax.evaluate.tasks.forms import Cloze, MultipleChoice, Rolling
from lmjax.evaluate.tasks.prompt import Item, Prompt
from lmjax.evaluate.tasks.registry import BENCHMARKS

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval"


def item(line: dict[str, Any]) -> Item:
    return Item(line["q"], tuple(line["a"]), line["gold"], line.get("of", ""), line.get("about", ""))


SUMS = Benchmark("sums.jsonl", item, MultipleChoice())


def lines(count: int) -> list[dict[str, Any]]:
    return [{"q": f"{n} + 1 =", "a": [str(n + 1), "none"], "gold": 0} for n in range(count)]


def write(folder: Path, records: list[dict[str, Any]], name: str = "sums.jsonl") -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return folder


def examples(prompt: Prompt, between: str = "\n\n") -> list[str]:
    return prompt.context.split(between)[:-1]


# Prompts ----------------------------------------------------------------------------------------------------------


def test_a_question_without_examples(tmp_path: Path) -> None:
    first, second = prompts(SUMS, write(tmp_path, lines(2)))
    assert (first.number, first.context, first.continuations, first.answer) == (0, "0 + 1 =", [" 1", " none"], "1")
    assert (second.number, second.context) == (1, "1 + 1 =")


def test_examples_come_from_other_questions(tmp_path: Path) -> None:
    for prompt in prompts(SUMS, write(tmp_path, lines(6)), shots=5):
        shown = examples(prompt)
        assert len(set(shown)) == 5 and prompt.context.endswith(prompt.item.context)
        assert {text.split(" = ")[0] for text in shown} == {f"{n} + 1" for n in range(6) if n != prompt.number}
        assert all(text == f"{n} + 1 = {n + 1}" for text in shown for n in [int(text.split()[0])])


def test_examples_follow_the_seed_and_the_place_alone(tmp_path: Path) -> None:
    whole = prompts(SUMS, write(tmp_path, lines(40)), shots=3, seed=7)
    assert prompts(SUMS, tmp_path, shots=3, seed=7) == whole
    assert prompts(SUMS, tmp_path, shots=3, seed=8) != whole
    some = prompts(SUMS, tmp_path, shots=3, seed=7, limit=10)
    assert len(some) == 10 and all(prompt == whole[prompt.number] for prompt in some)
    rng = random.Random(7)  # the harness's rule: one more than is shown, and the question itself left out
    for prompt in whole:
        drawn = [n for n in rng.sample(range(40), 4) if n != prompt.number][:3]
        assert [int(text.split()[0]) for text in examples(prompt)] == drawn


def test_a_question_that_is_there_twice_is_no_example_of_itself(tmp_path: Path) -> None:
    twice = lines(3) + lines(3)
    for prompt in prompts(SUMS, write(tmp_path, twice), shots=4):
        assert all(not text.startswith(prompt.item.context) for text in examples(prompt))


def test_examples_of_a_file_are_the_first_of_the_category(tmp_path: Path) -> None:
    marked = [{**line, "of": "odd" if n % 2 else "even", "about": f"Of {n % 2}.\n"} for n, line in enumerate(lines(12))]
    write(tmp_path, marked, "shown.jsonl.gz")
    benchmark = SUMS._replace(examples="shown.jsonl.gz", shots=2, delimiter=" is ", between="\n")
    for prompt in prompts(benchmark, write(tmp_path, marked[8:])):
        first = 0 if prompt.item.category == "even" else 1
        expected = f"Of {first}.\n{first} + 1 = is {first + 1}\n{first + 2} + 1 = is {first + 3}\n{prompt.item.context}"
        assert prompt.context == expected


# Subsets ----------------------------------------------------------------------------------------------------------


def test_a_subset_is_part_of_a_larger_one_in_whatever_order_the_file_is(tmp_path: Path) -> None:
    def chosen(limit: int) -> list[str]:
        return [prompt.item.context for prompt in prompts(SUMS, tmp_path, limit=limit)]

    write(tmp_path, lines(50))
    five, twenty = chosen(5), chosen(20)
    assert set(five) < set(twenty) and five == sorted(five, key=lambda text: int(text.split()[0]))
    assert five != [f"{n} + 1 =" for n in range(5)]
    assert len(chosen(1000)) == 50
    write(tmp_path, random.Random(0).sample(lines(50), 50))
    assert set(chosen(5)) == set(five)


# What does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"q": "1", "a": ["2"]}', "no field 'gold'"),
        ('{"q": "1", "a": ["2"], "gold": 1}', "the answer 1 is none of 1 choices"),
        ('{"q": "1", "a": ["2"], "gold": -1}', "the answer -1 is none"),
        ('{"q": 1, "a": ["2"], "gold": 0}', "a text is no string"),
        ('{"q": "1", "a": null, "gold": 0}', "not iterable"),
        ('{"q": "1", ', "Expecting"),
        ("[1, 2]", "list indices"),
        ("", "is empty"),
    ],
)
def test_lines_that_do_not_fit_are_named(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, lines(2))
    with open(tmp_path / "sums.jsonl", "a") as file:
        file.write(line)
    if not line:
        (tmp_path / "sums.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=message) as caught:
        prompts(SUMS, tmp_path)
    assert "sums.jsonl:3: " in str(caught.value) or not line


def test_files_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*sums\.jsonl: No such file"):
        prompts(SUMS, tmp_path)
    (tmp_path / "sums.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="not a gzip file"):
        prompts(SUMS._replace(file="sums.jsonl.gz"), tmp_path)


def test_more_examples_than_there_are(tmp_path: Path) -> None:
    write(tmp_path, lines(3))
    with pytest.raises(ConfigError, match="--shots=3 examples need more than the 3 questions"):
        prompts(SUMS, tmp_path, shots=3)
    with pytest.raises(ConfigError, match=r"--shots=4: .* has 3 of ''"):
        prompts(SUMS._replace(examples="sums.jsonl"), tmp_path, shots=4)
    texts = Benchmark("sums.jsonl", lambda line: Item(line["q"]), Rolling())
    with pytest.raises(ConfigError, match="asked for no answers"):
        prompts(texts, tmp_path, shots=1)


# The registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_reads_its_file(name: str) -> None:
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}")
    benchmark = BENCHMARKS[name]
    asked = prompts(benchmark, DATA)
    assert len(asked) >= 1000
    for prompt in asked[:: len(asked) // 50]:
        assert prompt.context and not prompt.context.endswith(" ")
        assert isinstance(benchmark.form, Rolling) or all(text.strip() for text in prompt.continuations)
        assert not isinstance(benchmark.form, MultipleChoice) or len(prompt.continuations) >= 2
        assert not isinstance(benchmark.form, Cloze) or len(prompt.continuations) == 1
    if any(prompt.item.category for prompt in asked):
        assert len({prompt.item.category for prompt in asked}) == 57
