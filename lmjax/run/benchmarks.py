"""A trained model on benchmarks, alone, beside another one, or asked otherwise; and other measures of texts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from lmjax.errors import ConfigError
from lmjax.evaluate.memorization import Lengths, ask
from lmjax.evaluate.page import page
from lmjax.evaluate.requests import Scorer
from lmjax.evaluate.tasks import given
from lmjax.evaluate.tasks.results import Result, as_json
from lmjax.evaluate.tasks.table import table
from lmjax.run.trained import Trained, data_of, load_trained, opened
from lmjax.tasks.benchmarks import asked_otherwise, questions
from lmjax.train.config import EvaluationsConfig


class Run(NamedTuple):
    """A work directory, which of its checkpoints (default: the newest), and in which bits its matrices are taken."""

    workdir: epath.PathLike
    step: int | None = None
    weights: str | None = None


class Outcome(NamedTuple):
    """What one model scores, and perhaps another on the same questions."""

    title: str
    results: Mapping[str, Result]
    against: Mapping[str, Result] | None

    def text(self) -> str:
        return "\n".join([self.title, *table(self.results, self.against)])

    def page(self) -> str:
        """As HTML, with examples."""
        return page(self.title, self.results, self.against)

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
        {name: of_name.answer(scorer(one, batch=batch, seq_len=seq_len)) for name, of_name in asked.items()}
        for one in trained
    )
    names = [_name(run, one) for run, one in zip(runs, trained, strict=True)]
    return Outcome("; other: ".join(names), results, others[0] if others else None)


def perturb(
    run: Run, cfg: EvaluationsConfig, hows: Sequence[str], *, batch: int, seq_len: int | None = None
) -> Outcome:
    """Put questions to a run otherwise, beside the same as they are. Raises as `asked_otherwise` and `evaluate` do."""
    asked = asked_otherwise(cfg, hows)
    trained = load_trained(*run)
    model = scorer(trained, batch=batch, seq_len=seq_len)
    results: dict[str, Result] = {}
    against: dict[str, Result] = {}
    for name, (plain, others) in asked.items():
        expected = plain.answer(model)
        results |= {f"{name} {how}": other.answer(model) for how, other in others.items()}
        against |= {f"{name} {how}": expected for how in others}
    return Outcome(f"{_name(run, trained)}; other: the same questions as they are", results, against)


def memorized(
    run: Run,
    paths: Sequence[str] | None,
    lengths: Lengths,
    *,
    count: int,
    seed: int,
    batch: int,
    seq_len: int | None = None,
) -> Outcome:
    """How much of its own data, or of those at `paths`, a run knows by heart, beside what it was not trained on.

    Raises ConfigError for pieces longer than what the model reads, and what `data_of`, `opened` and `ask` do.
    """
    trained = load_trained(*run)
    model, before, after = scorer(trained, batch=batch, seq_len=seq_len), *lengths
    if before + after > model.context:
        raise ConfigError(
            f"--memorized={before}:{after} are more tokens than the {model.context} that the model reads at once; ask "
            "for fewer, or raise --seq-len"
        )
    results = {}
    for path in paths or data_of(trained, run.workdir):
        dataset = opened(trained, path)
        for split in dataset.manifest.splits:
            where = f"{path}, {split}"
            results[where] = ask(model, dataset.split(split), lengths, count=count, seed=seed, where=where)
    return Outcome(f"{_name(run, trained)}: {after} tokens after {before}", results, None)


def judge(texts: epath.PathLike, references: epath.PathLike | None, toxicity: epath.PathLike | None) -> Outcome:
    """Texts of a file, whoever wrote them. Raises what `given.judge` does."""
    return Outcome(f"{texts}", {epath.Path(texts).name: given.judge(texts, references, toxicity)}, None)


def _name(run: Run, trained: Trained) -> str:
    return ", ".join([str(run.workdir), f"step {trained.step}", *([run.weights] if run.weights else [])])
