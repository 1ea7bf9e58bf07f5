"""PIQA: which of two ways reaches a goal in the physical world (Bisk et al. 2020, arXiv:1911.11641).

The validation set, as mosaicml/llm-foundry's `piqa.jsonl` has it.
"""

from collections.abc import Mapping
from typing import Any

from lmjax.evaluate.tasks.benchmark import Benchmark
from lmjax.evaluate.tasks.forms import MultipleChoice
from lmjax.evaluate.tasks.prompt import Item


def item(line: Mapping[str, Any]) -> Item:
    """Its query ends with a newline."""
    return Item(f"{line['query']}Answer:", tuple(line["choices"]), line["gold"])


def shorter(line: Mapping[str, Any]) -> Item:
    goal = line["query"].removeprefix("Question: ")
    return Item(f"Q: {goal}A:", tuple(line["choices"]), line["gold"])


def longer(line: Mapping[str, Any]) -> Item:
    goal = line["query"].removeprefix("Question: ")
    return Item(f"This is to be done: {goal}This is how:", tuple(line["choices"]), line["gold"])


PIQA = Benchmark("piqa.jsonl", item, MultipleChoice(unconditional="Answer:"), rewordings=(shorter, longer))
