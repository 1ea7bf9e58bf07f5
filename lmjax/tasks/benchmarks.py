"""Benchmarks that a language model answers while it is trained."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lmjax.config import Config
from lmjax.data.curate.classifier import load_classifier
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import ConfigError
from lmjax.evaluate.requests import Scorer
from lmjax.evaluate.tasks.benchmark import Benchmark, prompts
from lmjax.evaluate.tasks.perturb import PERTURBATIONS, REWORDED, perturbed
from lmjax.evaluate.tasks.prompt import Prompt
from lmjax.evaluate.tasks.registry import benchmark
from lmjax.evaluate.tasks.results import ALL, MACRO, Result, answer
from lmjax.evaluate.tasks.writing import Writing
from lmjax.tasks.task import Evaluate, Language
from lmjax.train.config import EvaluationsConfig
from lmjax.weights import Params


class Asked(NamedTuple):
    """A benchmark and the questions of it that are asked."""

    benchmark: Benchmark
    prompts: Sequence[Prompt]

    def answer(self, scorer: Scorer) -> Result:
        """What a model answers. All processes call it together. Raises what requests.py does."""
        return answer(self.benchmark, scorer, self.prompts)


def questions(cfg: EvaluationsConfig) -> dict[str, Asked]:
    """What the benchmarks ask, by their names. Raises DataError and ConfigError as `prompts` does."""
    return {name: _asked(_named(cfg, name), cfg) for name in cfg.tasks}


def _named(cfg: EvaluationsConfig, name: str) -> Benchmark:
    found = benchmark(name)
    if isinstance(found.form, Writing):
        toxicity = None if cfg.toxicity is None else load_classifier(cfg.toxicity)
        found = found._replace(form=Writing(cfg.tokens, cfg.temperature, cfg.seed, toxicity))
    return found


def _asked(one: Benchmark, cfg: EvaluationsConfig) -> Asked:
    return Asked(one, prompts(one, cfg.data, shots=cfg.shots, seed=cfg.seed, limit=cfg.limit))


def asked_otherwise(cfg: EvaluationsConfig, hows: Sequence[str]) -> dict[str, tuple[Asked, dict[str, Asked]]]:
    """Each benchmark as it is, and by the names of perturbations the same questions otherwise.

    Raises ConfigError for an unknown name and where nothing is asked otherwise, and what `questions` does.
    """
    known = [*PERTURBATIONS, REWORDED]
    if unknown := [how for how in hows if how not in known]:
        raise ConfigError(f"--perturb={unknown[0]} is not known; choose of {', '.join(known)}")

    def others(plain: Asked) -> dict[str, Asked]:
        words = plain.benchmark.rewordings if REWORDED in hows else ()
        reworded = [_asked(plain.benchmark._replace(item=item), cfg) for item in words]
        changed = {how: perturbed(plain.prompts, how, cfg.seed) for how in hows if how != REWORDED}
        return {how: plain._replace(prompts=prompts) for how, prompts in changed.items()} | {
            f"{REWORDED} {number}": one for number, one in enumerate(reworded, 1)
        }

    asked = {name: (plain, others(plain)) for name, plain in questions(cfg).items()}
    if not any(others for _, others in asked.values()):
        raise ConfigError(f"--perturb={REWORDED}: none of {', '.join(cfg.tasks)} has other words; name other ones")
    return asked


def benchmarks(cfg: Config, language: Language, tokenizer: Tokenizer) -> Evaluate:
    """Answer the same questions every time that they are due, as `eval/NAME/METRIC`, and their means over categories.

    Files are read, and requests made of them, now: what is wrong with them ends the run before its first step. Raises
    what `questions` and requests.py do.
    """
    assert cfg.train.evaluations is not None
    asked, every = questions(cfg.train.evaluations), cfg.train.evaluations.every
    rows = cfg.train.evaluate_batch or cfg.train.batch
    weightless = Scorer(language.scorer, {}, tokenizer, cfg.data.seq_len, rows)
    for one in asked.values():
        one.benchmark.form.check(weightless, one.prompts)

    def evaluate(
        params: Params,
        frozen: Params,
        *,
        step: int,
        mesh: jax.sharding.Mesh | None,
        last: bool,
        on_batch: Callable[[str], None],
    ) -> Mapping[str, Any]:
        if not last and step % (every or 1):
            return {}
        metrics: dict[str, Any] = {}
        scorer = weightless._replace(params=language.weights(frozen, params), mesh=mesh)
        for name, one in asked.items():
            result = one.answer(scorer._replace(on_batch=functools.partial(on_batch, name)))
            metrics[f"data/{name}/digest"] = result.digest
            for metric, by in result.numbers().items():
                for category, number in by.items():
                    if category in (ALL, MACRO):
                        key = "/".join(filter(None, ("eval", name, category, metric)))
                        metrics |= {key: number.value, f"{key}_stderr": number.stderr}
        return metrics

    return evaluate
