"""The benchmarks that `lmjax evaluate --tasks` and `train.evaluations` name, NAME or KIND:FILE."""

from lmjax.evaluate.tasks import own, pairs, writing
from lmjax.evaluate.tasks.arc_easy import ARC_EASY
from lmjax.evaluate.tasks.arithmetic import ARITHMETIC, ARITHMETIC_VOTE, ARITHMETIC_WRITTEN
from lmjax.evaluate.tasks.benchmark import Benchmark
from lmjax.evaluate.tasks.forms import Cloze, MultipleChoice, Rolling
from lmjax.evaluate.tasks.hellaswag import HELLASWAG
from lmjax.evaluate.tasks.lambada import LAMBADA, LAMBADA_PASSAGES
from lmjax.evaluate.tasks.mmlu import MMLU
from lmjax.evaluate.tasks.piqa import PIQA

BENCHMARKS: dict[str, Benchmark] = {
    "arc_easy": ARC_EASY,
    "arithmetic": ARITHMETIC,
    "arithmetic_vote": ARITHMETIC_VOTE,
    "arithmetic_written": ARITHMETIC_WRITTEN,
    "hellaswag": HELLASWAG,
    "lambada": LAMBADA,
    "lambada_passages": LAMBADA_PASSAGES,
    "mmlu": MMLU,
    "piqa": PIQA,
}

OWN: dict[str, Benchmark] = {
    "choices": Benchmark("", own.choices, MultipleChoice()),
    "cloze": Benchmark("", own.cloze, Cloze()),
    "pairs": Benchmark("", pairs.item, pairs.Pairs(), delimiter=""),
    "prompts": Benchmark("", writing.item, writing.Writing()),
    "texts": Benchmark("", own.texts, Rolling()),
}
"""Kinds of files of one's own."""


def benchmark(name: str) -> Benchmark:
    """The benchmark of a name, or of KIND:FILE."""
    kind, colon, file = name.partition(":")
    return OWN[kind]._replace(file=file) if colon else BENCHMARKS[name]
