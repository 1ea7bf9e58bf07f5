"""LAMBADA: the last word of a passage, which takes the whole passage to guess (Paperno et al. 2016, arXiv:1606.06031).

The passages are those of OpenAI, as mosaicml/llm-foundry's `lambada_openai.jsonl` has them.
"""

from collections.abc import Mapping
from typing import Any

from lmjax.evaluate.tasks.benchmark import Benchmark
from lmjax.evaluate.tasks.forms import Cloze, Rolling
from lmjax.evaluate.tasks.prompt import Item


def last_word(line: Mapping[str, Any]) -> Item:
    return Item(line["context"], (line["continuation"],))


def passage(line: Mapping[str, Any]) -> Item:
    return Item(f"{line['context']} {line['continuation']}")


LAMBADA = Benchmark("lambada_openai.jsonl", last_word, Cloze())
LAMBADA_PASSAGES = Benchmark("lambada_openai.jsonl", passage, Rolling())
