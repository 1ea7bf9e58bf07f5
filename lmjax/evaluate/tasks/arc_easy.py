"""ARC-Easy: questions of science at school (Clark et al. 2018, arXiv:1803.05457).

The test set, as mosaicml/llm-foundry's `arc_easy.jsonl` has it.
"""

from collections.abc import Mapping
from typing import Any

from lmjax.evaluate.tasks.benchmark import Benchmark
from lmjax.evaluate.tasks.forms import MultipleChoice
from lmjax.evaluate.tasks.prompt import Item


def item(line: Mapping[str, Any]) -> Item:
    return Item(f"{line['query']}\nAnswer:", tuple(line["choices"]), line["gold"])


def shorter(line: Mapping[str, Any]) -> Item:
    question = line["query"].removeprefix("Question: ")
    return Item(f"Q: {question}\nA:", tuple(line["choices"]), line["gold"])


def longer(line: Mapping[str, Any]) -> Item:
    question = line["query"].removeprefix("Question: ")
    return Item(f"Here is a question of science: {question}\nThe answer is:", tuple(line["choices"]), line["gold"])


ARC_EASY = Benchmark("arc_easy.jsonl", item, MultipleChoice(unconditional="Answer:"), rewordings=(shorter, longer))
