"""The command `lmjax evaluate`: likelihood on prepared data, scores on benchmarks, or on the tasks of lm-eval."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from lmjax.errors import ConfigError
from lmjax.process import ending
from lmjax.schema import validated


def evaluate(arguments: argparse.Namespace) -> int:
    """Loss, bits per byte and accuracy of a trained model on a prepared data set, or its scores on benchmarks."""
    from lmjax.process import start_up

    kind = _kind(arguments)
    start_up.enable_compile_cache()
    with ending.within_memory("--batch or --seq-len"):
        return kind(arguments)


def _kind(arguments: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    """What is asked for. Raises ConfigError for a flag that would not be read, or is missing."""
    kind = _KINDS["benchmarks" if arguments.tasks else "the harness's tasks" if arguments.harness else "prepared data"]
    for name in dict.fromkeys(name for other in _KINDS.values() for name in other.reads):
        if name not in kind.reads and getattr(arguments, name) is not None:
            what = next(what for what, other in _KINDS.items() if other is kind)
            raise ConfigError(f"--{name.replace('_', '-')} is not read by an evaluation on {what}; leave it out")
    if arguments.tasks and arguments.task_data is None:
        raise ConfigError("--tasks needs --task-data=DIR, where the benchmarks' files are (docs/evaluation.md)")
    if arguments.requests and not os.path.isdir(os.path.dirname(arguments.requests) or "."):
        raise ConfigError(f"--requests={arguments.requests}: there is no such folder; make it, or name another file")
    return kind.run


def _on_prepared_data(arguments: argparse.Namespace) -> int:
    from lmjax.run.trained import described, evaluate_trained, load_trained

    trained = load_trained(arguments.workdir, arguments.step)
    paths = arguments.data or [source.path for source in trained.cfg.data.sources.values()]
    if not paths:
        raise ConfigError(
            f"{arguments.workdir} names no data set: give --data=DIR, made by lmjax prepare TEXT --out=DIR "
            f"--tokenizer-file={arguments.workdir}/tokenizer"
        )
    results = evaluate_trained(
        trained,
        paths,
        split=arguments.split,
        batch=arguments.batch,
        seq_len=arguments.seq_len or trained.cfg.data.seq_len,
        documents=arguments.documents,
    )
    if arguments.json:
        print(json.dumps({path: dataclasses.asdict(result) for path, result in results.items()}, indent=1))
        return 0
    for path, result in results.items():
        print(f"{path} ({arguments.split}, {result.tokens:,} tokens), step {trained.step}")
        print("\n".join(described(result, cut=arguments.documents == "cut")))
    return 0


def _on_benchmarks(arguments: argparse.Namespace) -> int:
    from lmjax.run import benchmarks
    from lmjax.train.config import EvaluationsConfig

    given = {name: getattr(arguments, name) for name in ("tasks", "limit", "shots", "seed")}
    cfg = validated(EvaluationsConfig, given | {"data": arguments.task_data}, "--")
    runs = [benchmarks.Run(arguments.workdir, arguments.step)]
    runs += [benchmarks.Run(arguments.against)] if arguments.against else []
    outcome = benchmarks.evaluate(runs, cfg, batch=arguments.batch, seq_len=arguments.seq_len)
    return _shown(arguments, outcome)


def _on_harness(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--harness needs EleutherAI's harness: install lmjax[eval]")
    # Read when the harness is imported: no network; and no fork, which JAX's threads would not survive.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
    from lmjax.evaluate import harness
    from lmjax.run import benchmarks
    from lmjax.run.trained import load_trained

    trained = load_trained(arguments.workdir, arguments.step)
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


class _Kind(NamedTuple):
    run: Callable[[argparse.Namespace], int]
    reads: tuple[str, ...]
    """Flags that not all kinds read."""


_KINDS: dict[str, _Kind] = {
    "prepared data": _Kind(_on_prepared_data, ("data", "documents")),
    "benchmarks": _Kind(_on_benchmarks, ("tasks", "task_data", "shots", "limit", "against", "requests")),
    "the harness's tasks": _Kind(_on_harness, ("harness", "include_path", "shots", "limit", "requests")),
}
