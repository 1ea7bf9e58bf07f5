"""The numbers of a benchmark, over all items and by category, and the difference between two models."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.evaluate.requests import Scorer
from lmjax.evaluate.statistics import (
    Difference,
    Estimate,
    McNemar,
    difference,
    estimate,
    macro,
    macro_difference,
    mcnemar,
)
from lmjax.evaluate.tasks.benchmark import Benchmark
from lmjax.evaluate.tasks.forms import Answer, Together
from lmjax.evaluate.tasks.prompt import Prompt
from lmjax.record.files import hash_bytes
from lmjax.record.jsonl import plain

MACRO = "macro"
"""In the place of a category: the mean over all of them."""
ALL = ""
"""In the place of a category: all items."""


class Result(NamedTuple):
    """What a model scores on a benchmark."""

    prompts: Sequence[Prompt]
    answers: Sequence[Answer]
    digest: str
    """Of all that was asked: numbers compare where it is the same."""
    together: Together = Together()

    @property
    def metrics(self) -> list[str]:
        """Those of items; not every item need have each."""
        return list(dict.fromkeys(metric for answer in self.answers for metric in answer.scores))

    @property
    def unread(self) -> int:
        """Items of which a part did not fit into what the model reads."""
        return sum(answer.unread > 0 for answer in self.answers)

    def numbers(self) -> dict[str, dict[str, Estimate]]:
        """Metric -> category -> estimate. Where there are categories, `macro` is their mean; `ALL` is all items."""
        found = {}
        for metric in self.metrics:
            by = {name: estimate(*values) for name, values in self._by_category(metric).items()}
            if len(by) > 1:
                by = {ALL: by.pop(ALL), MACRO: macro(list(by.values())), **by}
            found[metric] = by
        if "nll" in found:
            found["perplexity"] = {name: _exponential(one) for name, one in found["nll"].items()}
        return found | {metric: {ALL: number} for metric, number in self.together.numbers.items()}

    def less(self, other: "Result") -> dict[str, dict[str, Difference]]:
        """Metric -> category -> this model less another, which answered the same items.

        What is counted by tokens is left out where the models have other tokens.
        """
        self._check_same_items(other)
        found = {}
        for metric in self.metrics:
            mine, theirs = self._by_category(metric), other._by_category(metric)
            if not np.array_equal(mine[ALL][1], theirs[ALL][1]):
                continue
            by = {name: difference(mine[name], theirs[name]) for name in mine}
            if len(by) > 1:
                by = {ALL: by.pop(ALL), MACRO: macro_difference(list(by.values())), **by}
            found[metric] = by
        return found

    def disagreements(self, other: "Result") -> dict[str, McNemar]:
        """Metric -> McNemar's test, for metrics that are right or wrong."""
        self._check_same_items(other)
        found = {}
        for metric in self.metrics:
            (mine, weights), (theirs, _) = self._of(metric), other._of(metric)
            if set(weights) == {1.0} and {*mine, *theirs} <= {0.0, 1.0}:
                found[metric] = mcnemar(mine, theirs)
        return found

    def records(self) -> list[dict[str, Any]]:
        """One for each item, as JSON."""
        return [
            {
                "number": prompt.number,
                **({"category": prompt.item.category} if prompt.item.category else {}),
                **answer.record,
                "scores": {name: list(score) for name, score in answer.scores.items()},
                **({"unread": answer.unread} if answer.unread else {}),
            }
            for prompt, answer in zip(self.prompts, self.answers, strict=True)
        ]

    def _check_same_items(self, other: "Result") -> None:
        mine, theirs = ([(one.number, one.item.gold) for one in of.prompts] for of in (self, other))
        assert mine == theirs, "not the same items"

    def _of(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        y_B, weight_B = np.array([answer.scores[metric] for answer in self.answers if metric in answer.scores]).T
        return y_B, weight_B

    def _by_category(self, metric: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        y_B, weight_B = self._of(metric)
        pairs = zip(self.prompts, self.answers, strict=True)
        categories = np.array([prompt.item.category for prompt, answer in pairs if metric in answer.scores])
        chosen = {name: categories == name for name in sorted({*categories.tolist()} - {""})}
        return {ALL: (y_B, weight_B)} | {name: (y_B[rows], weight_B[rows]) for name, rows in chosen.items()}


def _exponential(one: Estimate) -> Estimate:
    """exp of an estimate and of its interval, the standard error by the delta method."""
    value, low, high = (float(np.exp(x)) for x in (one.value, one.low, one.high))
    return Estimate(value, value * one.stderr, low, high, one.items)


def answer(benchmark: Benchmark, scorer: Scorer, prompts: Sequence[Prompt]) -> Result:
    """Ask a model. All processes call it together. Raises what requests.py does."""
    answers = benchmark.form.answers(scorer, prompts)
    return Result(prompts, answers, digest(prompts), benchmark.form.together(prompts, answers))


def digest(prompts: Sequence[Prompt]) -> str:
    """The hash of all that is asked, and of what answers are judged by."""
    texts = (
        text
        for one in prompts
        for text in (one.context, str(one.item.gold), *one.continuations, *one.item.references, *one.item.patterns)
    )
    return hash_bytes("\0".join(texts).encode(), digest_size=8)


def as_json(numbers: Mapping[str, Mapping[str, NamedTuple]]) -> dict[str, Any]:
    """Estimates or differences as plain values."""
    return {metric: {name or "all": plain(one._asdict()) for name, one in by.items()} for metric, by in numbers.items()}
