"""The command `lmjax evaluate`: likelihood on prepared data, or scores on benchmarks, alone or beside another run's."""

import argparse
import dataclasses
import json

from lmjax.errors import ConfigError
from lmjax.process import ending
from lmjax.schema import validated


def evaluate(arguments: argparse.Namespace) -> int:
    """Loss, bits per byte and accuracy of a trained model on a prepared data set, or its scores on benchmarks."""
    from lmjax.process import start_up

    _check(arguments)
    start_up.enable_compile_cache()
    with ending.within_memory("--batch or --seq-len"):
        return _on_benchmarks(arguments) if arguments.tasks else _on_prepared_data(arguments)


# What one kind of evaluation reads and the other would not.
_OF_PREPARED_DATA = ("data", "documents")
_OF_BENCHMARKS = ("task_data", "shots", "limit", "against", "requests")


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for a flag that would not be read, or is missing."""
    for name in _OF_PREPARED_DATA if arguments.tasks else _OF_BENCHMARKS:
        if getattr(arguments, name) is not None:
            what = "is of prepared data: leave out --tasks" if arguments.tasks else "is of benchmarks: give --tasks"
            raise ConfigError(f"--{name.replace('_', '-')} {what}")
    if arguments.tasks and arguments.task_data is None:
        raise ConfigError("--tasks needs --task-data=DIR, where the benchmarks' files are (docs/evaluation.md)")


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
    if arguments.requests:
        outcome.write_requests(arguments.requests)
    print(json.dumps(outcome.as_json(), indent=1) if arguments.json else outcome.text())
    return 0
