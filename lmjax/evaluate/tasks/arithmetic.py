"""Sums, differences and products of small numbers: mosaicml/llm-foundry's `simple_arithmetic_withspaces.jsonl`.

Three ways to ask: would the answer be written, is it written, and is it what most of eight drawn answers say.
"""

from collections.abc import Mapping
from typing import Any

from lmjax.evaluate.tasks.benchmark import Benchmark
from lmjax.evaluate.tasks.forms import Cloze, Form, Generation
from lmjax.evaluate.tasks.prompt import Item


def item(line: Mapping[str, Any]) -> Item:
    """Its answer begins with a space."""
    return Item(line["context"], (line["continuation"],))


def asked_by(form: Form) -> Benchmark:
    return Benchmark("simple_arithmetic_withspaces.jsonl", item, form, delimiter="", between="\n", shots=5)


ARITHMETIC = asked_by(Cloze())
ARITHMETIC_WRITTEN = asked_by(Generation(tokens=16, stop=("\n",)))
ARITHMETIC_VOTE = asked_by(Generation(tokens=16, stop=("\n",), samples=8, temperature=0.7))
