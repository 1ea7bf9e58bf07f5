"""The command `lmjax evaluate`: likelihood on prepared data, scores on benchmarks or the tasks of lm-eval, text that is
known by heart, and how good texts are."""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lmjax.errors import ConfigError
from lmjax.process import ending

if TYPE_CHECKING:
    from lmjax.run.benchmarks import Outcome


def evaluate(arguments: argparse.Namespace) -> int:
    """How good a trained model is: by the likelihood of prepared data, on benchmarks, by what it writes."""
    from lmjax.process import start_up

    kind = _kind(arguments)
    start_up.configure_jax()
    with ending.within_memory("--batch or --seq-len"):
        return kind(arguments)


def _kind(arguments: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    """What is asked for. Raises ConfigError for a flag that would not be read, or is missing."""
    kind = next(kind for kind in _KINDS if kind.flag is None or getattr(arguments, kind.flag))
    for name in dict.fromkeys(name for other in _KINDS for name in other.reads):
        if name not in kind.reads and getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is not read by an evaluation on {kind.of}; leave it out")
    if "workdir" in kind.reads and arguments.workdir is None:
        raise ConfigError(f"--workdir=DIR is missing: the trained run whose evaluation on {kind.of} this is")
    if arguments.tasks and arguments.task_data is None:
        raise ConfigError("--tasks needs --task-data=DIR, where the benchmarks' files are (docs/evaluation.md)")
    if arguments.perturb and arguments.against:
        raise ConfigError("--perturb compares a run with itself, and --against with another; leave out the one")
    for flag in ("requests", "page"):
        path = getattr(arguments, flag)
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise ConfigError(f"--{flag}={path}: there is no such folder; make it, or name another file")
    return kind.run


def _on_prepared_data(arguments: argparse.Namespace) -> int:
    from lmjax.record.jsonl import plain
    from lmjax.run.trained import data_of, described, evaluate_trained, load_trained

    trained = load_trained(arguments.workdir, arguments.step, arguments.weights)
    score = functools.partial(
        evaluate_trained,
        paths=arguments.data or data_of(trained, arguments.workdir),
        split=arguments.split,
        batch=arguments.batch,
        seq_len=arguments.seq_len or trained.cfg.data.seq_len,
        documents=arguments.documents,
    )
    others = {}
    if arguments.against:  # first, since one that does not fit is found in no time
        other = load_trained(arguments.against)
        others = score(other._replace(cfg=trained.cfg))  # it reads the same rows
    results = score(trained)
    if arguments.json:
        of = {"step": trained.step, "weights": arguments.weights, "split": arguments.split}
        found = {path: of | plain(result.numbers()) for path, result in results.items()}
        for path, beside in others.items():
            found[path]["against"] = {"workdir": arguments.against, "step": other.step, **plain(beside.numbers())}
            found[path]["difference"] = {"loss": plain(results[path].less(beside)._asdict())}
        print(json.dumps(found, indent=1, allow_nan=False))
        return 0
    bits = f", {arguments.weights}" if arguments.weights else ""
    for path, result in results.items():
        print(f"{path} ({arguments.split}, {result.tokens:,} tokens), step {trained.step}{bits}")
        print("\n".join(described(result, cut=arguments.documents == "cut")))
        if path in others:
            value, stderr, low, high, _ = result.less(others[path])
            print(
                f"  difference     {value:+.6f} +- {stderr:.6f} nats per token, [{low:+.6f}, {high:+.6f}] at 95%, to "
                f"{arguments.against}, step {other.step}, row by row"
            )
    return 0


def _on_benchmarks(arguments: argparse.Namespace) -> int:
    from lmjax.run import benchmarks
    from lmjax.schema import validated
    from lmjax.train.config import EvaluationsConfig

    given = {name: getattr(arguments, name) for name in ("tasks", "shots", "seed", "tokens", "temperature", "toxicity")}
    given = {name: value for name, value in given.items() if value is not None}
    cfg = validated(EvaluationsConfig, given | {"limit": arguments.limit, "data": arguments.task_data}, "--")
    run = benchmarks.Run(arguments.workdir, arguments.step, arguments.weights)
    rows = {"batch": arguments.batch, "seq_len": arguments.seq_len}
    if arguments.perturb:
        return _shown_with_page(arguments, benchmarks.perturb(run, cfg, arguments.perturb, **rows))
    others = [benchmarks.Run(arguments.against)] if arguments.against else []
    return _shown_with_page(arguments, benchmarks.evaluate([run, *others], cfg, **rows))


def _on_memorized_text(arguments: argparse.Namespace) -> int:
    from lmjax.evaluate.memorization import Lengths
    from lmjax.run import benchmarks

    outcome = benchmarks.memorized(
        benchmarks.Run(arguments.workdir, arguments.step, arguments.weights),
        arguments.data,
        Lengths(*arguments.memorized),
        count=arguments.limit or _PREFIXES,
        seed=arguments.seed,
        batch=arguments.batch,
        seq_len=arguments.seq_len,
    )
    return _shown_with_page(arguments, outcome)


_PREFIXES = 1000


def _on_texts(arguments: argparse.Namespace) -> int:
    from lmjax.run import benchmarks

    return _shown_with_page(arguments, benchmarks.judge(arguments.texts, arguments.references, arguments.toxicity))


def _on_harness(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--harness needs EleutherAI's harness: install lmjax[eval]")
    # Read when the harness is imported: no network; and no fork, which JAX's threads would not survive.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
    from lmjax.evaluate import harness
    from lmjax.run import benchmarks
    from lmjax.run.trained import load_trained

    trained = load_trained(arguments.workdir, arguments.step, arguments.weights)
    with contextlib.redirect_stdout(sys.stderr):  # it reports its progress
        outcome = harness.evaluate(
            benchmarks.scorer(trained, batch=arguments.batch, seq_len=arguments.seq_len),
            arguments.harness,
            include_path=arguments.include_path,
            shots=arguments.shots,
            limit=arguments.limit,
            seed=arguments.seed,
        )
    return _shown(arguments, outcome)


class _Outcome(Protocol):
    def text(self) -> str: ...

    def as_json(self) -> dict[str, Any]: ...

    def records(self) -> Iterable[Mapping[str, Any]]: ...


def _shown(arguments: argparse.Namespace, outcome: _Outcome) -> int:
    """Print the outcome, and write what was said of each question where that is asked for."""
    from lmjax.record import files

    print(json.dumps(outcome.as_json(), indent=1) if arguments.json else outcome.text(), flush=True)
    if arguments.requests:
        lines = (json.dumps(record, default=str) + "\n" for record in outcome.records())
        files.write_bytes(files.locate(arguments.requests), "".join(lines).encode())
    return 0


def _shown_with_page(arguments: argparse.Namespace, outcome: "Outcome") -> int:
    """Also write a page where that is asked for."""
    from lmjax.record import files

    if arguments.page:
        files.write_atomically(files.locate(arguments.page), outcome.page())
    return _shown(arguments, outcome)


class _Kind(NamedTuple):
    of: str
    flag: str | None
    """What asks for it."""
    run: Callable[[argparse.Namespace], int]
    reads: tuple[str, ...]
    """Flags that not all kinds read."""


_TASK_FLAGS = ("workdir", "weights", "shots", "limit", "requests")
_KINDS: tuple[_Kind, ...] = (
    _Kind(
        "benchmarks",
        "tasks",
        _on_benchmarks,
        ("tasks", "task_data", "against", "perturb", "tokens", "temperature", "toxicity", "page", *_TASK_FLAGS),
    ),
    _Kind("the harness's tasks", "harness", _on_harness, ("harness", "include_path", *_TASK_FLAGS)),
    _Kind("text that it may have memorized", "memorized", _on_memorized_text,
          ("memorized", "workdir", "weights", "data", "limit", "requests", "page")),
    _Kind("texts", "texts", _on_texts, ("texts", "references", "toxicity", "requests", "page")),
    _Kind("prepared data", None, _on_prepared_data, ("workdir", "weights", "against", "data", "documents")),
)  # fmt: skip
