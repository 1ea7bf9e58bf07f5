"""Benchmarks that a language model answers while it is trained."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lmjax.config import Config
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.evaluate.requests import Scorer
from lmjax.evaluate.tasks.benchmark import prompts
from lmjax.evaluate.tasks.prompt import Prompt
from lmjax.evaluate.tasks.registry import BENCHMARKS
from lmjax.evaluate.tasks.results import ALL, MACRO, answer
from lmjax.tasks.task import Evaluate, Language
from lmjax.train.config import EvaluationsConfig
from lmjax.weights import Params


def questions(cfg: EvaluationsConfig) -> dict[str, list[Prompt]]:
    """What the benchmarks ask, by their names. Raises DataError and ConfigError as `prompts` does."""
    return {
        name: prompts(BENCHMARKS[name], cfg.data, shots=cfg.shots, seed=cfg.seed, limit=cfg.limit) for name in cfg.tasks
    }


def benchmarks(cfg: Config, language: Language, tokenizer: Tokenizer) -> Evaluate:
    """Answer the same questions every time that they are due, as `eval/NAME/METRIC`, and their means over categories.

    Files are read, and requests made of them, now: what is wrong with them ends the run before its first step. Raises
    what `questions` and requests.py do.
    """
    assert cfg.train.evaluations is not None
    asked, every = questions(cfg.train.evaluations), cfg.train.evaluations.every
    rows = cfg.train.evaluate_batch or cfg.train.batch
    weightless = Scorer(language.scorer, {}, tokenizer, cfg.data.seq_len, rows)
    for name, of_name in asked.items():
        BENCHMARKS[name].form.check(weightless, of_name)

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
        for name, of_name in asked.items():
            scorer = scorer._replace(on_batch=functools.partial(on_batch, name))
            result = answer(BENCHMARKS[name], scorer, of_name)
            metrics[f"data/{name}/digest"] = result.digest
            for metric, by in result.numbers().items():
                for category, one in by.items():
                    if category in (ALL, MACRO):
                        key = "/".join(filter(None, ("eval", name, category, metric)))
                        metrics |= {key: one.value, f"{key}_stderr": one.stderr}
        return metrics

    return evaluate
