"""A trained model on benchmarks, and beside another one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from lmjax.evaluate.requests import Scorer
from lmjax.evaluate.tasks.registry import BENCHMARKS
from lmjax.evaluate.tasks.results import Result, answer, as_json
from lmjax.evaluate.tasks.table import table
from lmjax.run.trained import Trained, load_trained
from lmjax.tasks.benchmarks import questions
from lmjax.train.config import EvaluationsConfig


class Run(NamedTuple):
    """A work directory, and which of its checkpoints (default: the newest)."""

    workdir: epath.PathLike
    step: int | None = None


class Outcome(NamedTuple):
    """What one model scores, and perhaps another on the same questions."""

    title: str
    results: Mapping[str, Result]
    against: Mapping[str, Result] | None

    def text(self) -> str:
        return "\n".join([self.title, *table(self.results, self.against)])

    def as_json(self) -> dict[str, Any]:
        """By benchmark, metric and category; of two models also their differences."""
        return {name: self._of(name) for name in self.results}

    def _of(self, name: str) -> dict[str, Any]:
        result = self.results[name]
        found: dict[str, Any] = {"items": len(result.answers), "unread": result.unread, "digest": result.digest}
        found["metrics"] = as_json(result.numbers())
        if self.against is not None:
            other = self.against[name]
            found["against"], found["difference"] = as_json(other.numbers()), as_json(result.less(other))
            found["mcnemar"] = {metric: test._asdict() for metric, test in result.disagreements(other).items()}
        return found

    def records(self) -> Iterator[dict[str, Any]]:
        """One for each question of each benchmark: what the model said, and its scores."""
        for name, result in self.results.items():
            yield from ({"task": name} | record for record in result.records())


def scorer(trained: Trained, *, batch: int, seq_len: int | None = None) -> Scorer:
    """The model as requests are put to it: it reads as much at once as in training, or `seq_len` tokens."""
    return Scorer(trained.scorer, trained.params, trained.tokenizer, seq_len or trained.cfg.data.seq_len, batch)


def evaluate(runs: Sequence[Run], cfg: EvaluationsConfig, *, batch: int, seq_len: int | None = None) -> Outcome:
    """Put the same questions to one run, or to two. All files are read before the first is asked.

    Raises what `questions`, `load_trained` and requests.py do.
    """
    asked = questions(cfg)
    trained = [load_trained(*run) for run in runs]
    results, *others = (
        {name: answer(BENCHMARKS[name], scorer(one, batch=batch, seq_len=seq_len), asked[name]) for name in asked}
        for one in trained
    )
    names = [f"{run.workdir}, step {one.step}" for run, one in zip(runs, trained, strict=True)]
    return Outcome("; other: ".join(names), results, others[0] if others else None)
