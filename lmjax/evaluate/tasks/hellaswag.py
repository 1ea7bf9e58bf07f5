"""HellaSwag: how a described scene goes on (Zellers et al. 2019, arXiv:1905.07830).

The 1000 questions that allenai/OLMo-in-loop-evals takes from the validation set.
"""

from collections.abc import Mapping
from typing import Any

from lmjax.evaluate.tasks.benchmark import Benchmark
from lmjax.evaluate.tasks.forms import MultipleChoice
from lmjax.evaluate.tasks.prompt import Item


def item(line: Mapping[str, Any]) -> Item:
    return Item(line["query"], tuple(line["choices"]), line["gold"])


HELLASWAG = Benchmark("hellaswag_1000.jsonl", item, MultipleChoice())
