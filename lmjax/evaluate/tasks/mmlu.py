"""MMLU: exams of 57 subjects, answered by a letter (Hendrycks et al. 2020, arXiv:2009.03300).

Validation questions after five of the subject's dev questions, in the wording of EleutherAI's harness.
"""

from collections.abc import Mapping
from typing import Any

from lmjax.evaluate.tasks.benchmark import Benchmark
from lmjax.evaluate.tasks.forms import MultipleChoice
from lmjax.evaluate.tasks.prompt import Item

LETTERS = ("A", "B", "C", "D")


def item(line: Mapping[str, Any]) -> Item:
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, line["choices"], strict=True))
    subject = line["subject"].replace("_", " ")
    return Item(
        f"{line['question'].strip()}{listed}\nAnswer:",
        LETTERS,
        line["answer"],
        category=line["subject"],
        description=f"The following are multiple choice questions (with answers) about {subject}.\n\n",
    )


MMLU = Benchmark("mmlu_validation.jsonl.gz", item, MultipleChoice(), shots=5, examples="mmlu_dev.jsonl.gz")
