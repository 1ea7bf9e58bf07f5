"""A trained model under EleutherAI's harness (lm-eval, the extra `eval`): its tasks and metrics, our likelihoods.

Texts become tokens as the harness makes them for transformers, so that the same weights get the same numbers there.
This module alone imports the harness.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lmjax.errors import ConfigError
from lmjax.evaluate.requests import Request, Scorer, continuations, log_likelihoods
from lmjax.evaluate.tasks.table import aligned, number
from lmjax.generate.config import GenerateConfig
from lmjax.schema import validated

_TOKENS = 256  # most new ones where a task does not say
_RESAMPLES = 1000  # for standard errors without a formula, such as perplexity's: good to 2%
_READ = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class HarnessModel(TemplateLM):
    """What the harness asks of a model, by requests.py."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer, self.max_length = scorer, scorer.context

    @property
    def eot_token_id(self) -> int:
        return self.scorer.tokenizer.endoftext_id

    @property
    def prefix_token_id(self) -> int:
        begin_id = self.scorer.tokenizer.begin_id
        return self.eot_token_id if begin_id is None else begin_id

    @property
    def tokenizer_name(self) -> str:
        return self.scorer.tokenizer.hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Behind the begin symbol, if the tokenizer has one, unless it is not to be added."""
        begin_id = self.scorer.tokenizer.begin_id
        begin = [] if begin_id is None or add_special_tokens is False else [begin_id]
        return begin + self.scorer.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [Request(context, continuation, 0) for _, context, continuation in requests]
        return [(one.logprob, one.greedy) for one in log_likelihoods(self.scorer, asked)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Disjoint windows, the last one with all the context that fits."""
        cut = [self._windows(one.args[0]) for one in requests]
        scores = iter(log_likelihoods(self.scorer, [part for parts in cut for part in parts]))
        return [sum(next(scores).logprob for _ in parts) for parts in cut]

    def _windows(self, text: str) -> list[Request]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.scorer.context,
            context_len=1,
        )
        return [Request(context, continuation, 0) for context, continuation in map(make_disjoint_window, windows)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy, or sampled where the task says so; a request's place names its draws."""
        texts: dict[int, str] = {}
        settings = [_settings(one.args[1]) for one in requests]
        for chosen in dict.fromkeys(settings):
            places = [place for place, setting in enumerate(settings) if setting == chosen]
            prompts, (cfg, stop) = [requests[place].args[0] for place in places], chosen
            written = continuations(self.scorer, prompts, cfg, stop=stop, numbers=places)
            texts |= dict(zip(places, written, strict=True))
        return [texts[place] for place in range(len(requests))]


def _settings(given: dict[str, Any]) -> tuple[GenerateConfig, tuple[str, ...]]:
    """(how to write, where to stop). Raises ConfigError for what would not be read."""
    kwargs = dict(normalize_gen_kwargs(given, _TOKENS))
    if unread := {*kwargs} - _READ:
        raise ConfigError(f"generation_kwargs.{min(unread)} of a task is not known here; known are {sorted(_READ)}")
    until = kwargs.get("until") or []
    stop = (until,) if isinstance(until, str) else tuple(until)
    sampled = {name: kwargs[name] for name in ("top_p", "top_k") if kwargs["do_sample"] and name in kwargs}
    temperature = kwargs["temperature"] or 1.0 if kwargs["do_sample"] else 0.0
    cfg = {"tokens": kwargs["max_gen_toks"], "temperature": temperature, **sampled}
    return validated(GenerateConfig, cfg, "generation_kwargs."), tuple(text for text in stop if text)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the harness returns."""

    results: dict[str, Any]

    def text(self) -> str:
        """A line for each task and metric; a metric's name says which of the task's filters it is behind, if any."""
        rows = [["task", "metric", "", "value", "+-", "items"]]
        for task, found in self.results["results"].items():
            items = self.results["n-samples"].get(task, {}).get("effective", "")
            for name, value in found.items():
                metric, _, behind = name.partition(",")
                if isinstance(value, float) and not metric.endswith("_stderr"):
                    stderr = found.get(f"{metric}_stderr,{behind}")
                    shown = number(stderr) if isinstance(stderr, float) else ""
                    rows.append([task, metric, "" if behind == "none" else behind, number(value), shown, str(items)])
        return "\n".join(aligned(rows))

    def as_json(self) -> dict[str, Any]:
        return {name: self.results[name] for name in ("results", "versions", "n-shot", "n-samples")}

    def records(self) -> list[dict[str, Any]]:
        """One for each question of each task: its requests, what the model said of them, the task's scores."""
        return [{"task": task, **sample} for task, samples in self.results["samples"].items() for sample in samples]


def evaluate(
    scorer: Scorer, tasks: Sequence[str], *, include_path: str | None, shots: int | None, limit: int | None, seed: int
) -> Outcome:
    """The harness's tasks by name, those of YAML files in `include_path` too. `limit` takes the first questions.

    Raises ConfigError for a name that the harness does not know.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        where = f" and {include_path}" if include_path else ""
        raise ConfigError(f"--harness: the harness{where} has no task '{unknown[0]}'; `lm_eval ls tasks` lists its own")
    return Outcome(
        simple_evaluate(
            HarnessModel(scorer),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            fewshot_random_seed=seed,
            torch_random_seed=None,
            bootstrap_iters=_RESAMPLES,
        )
    )
