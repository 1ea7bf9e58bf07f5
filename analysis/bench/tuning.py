"""What ways of tuning learn, cost and forget: the table of docs/tuning.md.

    python -m analysis.bench.tuning --out=DIR --base=WORKDIR --stories=TEXT --set lessons=FILE --set identity=FILE
        [--methods "all weights" ...] [--seeds=3] [--report]

A trained model, a work directory, is tuned on each set of conversations by each method. A method's learning rate is
found on the first set, with a seed of its own, by a walk in factors of three from a first guess towards the lower loss
of the validation responses, until both neighbours of a rate are worse. With that rate, or one in proportion (SETS), it
trains on each set with each seed. DIR/runs.csv gets a line as each run ends, and a run that is there is not trained
again. With --report it trains nothing, and prints the tables of what is there.

Loss is in nats per scored token of the whole validation split, on the texts that the base is from per token of windows
of SEQ_LEN, and a soft prompt or a prefix stands in front of these, too. CPU time is the process's, of steps after the
first; memory is XLA's plan for the compiled step.
"""

import argparse
import csv
import dataclasses
import functools
import itertools
import runpy
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.config import Config, parse
from lmjax.data.config import DataConfig, PrepareConfig, TokenizerConfig
from lmjax.data.prepare.prepare import prepare
from lmjax.data.store.dataset import Dataset, open_dataset
from lmjax.evaluate.splits import evaluate_split
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate
from lmjax.process import start_up
from lmjax.registry import with_data
from lmjax.run.assemble import (
    Experiment,
    abstract_batch,
    abstract_frozen,
    abstract_state,
    assemble,
    frozen_params,
    initial_state,
    jitted_step,
)
from lmjax.weights import Params, count

SEQ_LEN = 256
"""Of the texts that the base is from."""
CHOOSING_SEED = 100
FACTOR = 3.0
UNTUNED = "not tuned"


class Set(NamedTuple):
    """How conversations of a set are trained on."""

    steps: int
    batch: int
    seq_len: int
    valid_fraction: float
    times: float
    """The learning rate, over the one that was found on the first set."""


SETS = {
    "lessons": Set(120, 8, 128, 0.25, times=1.0),
    "identity": Set(400, 8, 400, 0.1, times=3.0),  # to be learned by heart
}


class Method(NamedTuple):
    """What of the weights is trained, as `tune` in a config has it."""

    tune: Mapping[str, Any]
    first_rate: float


METHODS = {
    "all weights": Method({}, 3e-3),
    "head and embeddings (tied)": Method({"train": ("embed",)}, 1e-2),
    "LoRA, rank 8": Method({"adapter": {"name": "lora", "rank": 8, "alpha": 16.0}}, 1e-2),
    "LoRA, rank 8, of the table too": Method(
        {"adapter": {"name": "lora", "rank": 8, "alpha": 16.0, "targets": ("*",)}}, 1e-2
    ),
    "DoRA, rank 8": Method({"adapter": {"name": "dora", "rank": 8, "alpha": 16.0}}, 1e-2),
    "soft prompt, 20 places": Method({"adapter": {"name": "prompt", "length": 20}}, 3e-2),
    "prefix, 20 places": Method({"adapter": {"name": "prefix", "length": 20}}, 3e-2),
}


class Run(NamedTuple):
    set: str
    method: str
    rate: float
    seed: int


class Result(NamedTuple):
    valid: float
    """Loss on the validation responses."""
    train: float
    """Loss on the responses that were trained on."""
    exact: float
    """Responses that greedy decoding gives exactly, of those trained on; not counted where the rate is chosen."""
    asked: int
    stories: float
    """Loss on the texts that the base is from."""
    parameters: int
    """Those that are trained."""
    cpu_seconds: float
    """Per step."""
    mebibytes: float
    """Arguments, temporaries and outputs of the compiled step."""


# Training ---------------------------------------------------------------------------------------------------------


def make_config(base: Path, out: Path, file: str, name: str, method: Method) -> Config:
    """The config of configs/tune/instruct.py, with this set and this method."""
    of = SETS[name]
    tree = runpy.run_path("configs/tune/instruct.py")["get_config"](str(base)).to_dict()
    lessons = tree["data"]["sources"].pop("lessons")
    lessons["path"] = str(out / "data" / name)
    lessons["prepare"] |= {"inputs": (file,), "valid_fraction": of.valid_fraction}
    tree["data"] |= {"sources": {"set": lessons}, "seq_len": of.seq_len}
    tree["tune"] |= dict(method.tune)
    tree["train"] |= {"steps": of.steps, "batch": of.batch}
    tree["train"]["sample"]["prompts"] = ()
    return parse(tree)


class Bench:
    """One method on one set: the compiled step, and what its results are measured with."""

    def __init__(self, cfg: Config, stories: Path) -> None:
        self.task = with_data(cfg)
        self.experiment = assemble(self.task)
        self.step = jitted_step(self.experiment)
        self.frozen = frozen_params(self.experiment)
        self.dataset = open_dataset(cfg.data.sources["set"].path)
        self.stories = open_dataset(str(stories)).split("valid")
        self.questions = asked(self.dataset)

    def train(self, run: Run) -> Result:
        """Train one run to its end and measure it."""
        experiment = with_rate(self.experiment, run)
        steps, batch = experiment.cfg.train.steps, experiment.cfg.train.batch
        state, seconds = initial_state(experiment), 0.0
        assert self.task.source is not None
        batches = iter(self.task.source(rows=np.arange(batch), at=run.seed * steps * batch))
        for number in range(steps):
            rows = next(batches)
            before = time.process_time()
            state, _ = jax.block_until_ready(self.step(state, self.frozen, rows))
            seconds += (time.process_time() - before) if number else 0.0
        return self.measured(state.params, seconds / (steps - 1), counts=run.seed != CHOOSING_SEED)

    def measured(self, params: Params, cpu_seconds: float, *, counts: bool) -> Result:
        language = self.task.language
        assert language is not None
        weights = language.weights(self.frozen, params)
        losses = {
            split: evaluate_split(language.scorer, weights, self.dataset.split(split), self.task.cfg.data, batch=8).loss
            for split in ("valid", "train")
        }
        old = evaluate_split(language.scorer, weights, self.stories, DataConfig(seq_len=SEQ_LEN), batch=8)
        return Result(
            losses["valid"],
            losses["train"],
            self.exact(weights) if counts else np.nan,
            len(self.questions),
            old.loss,
            count(self.task.spec).total,
            cpu_seconds,
            planned_mebibytes(self.experiment),
        )

    def exact(self, weights: Params) -> int:
        """How many of the responses greedy decoding gives to their prompts, token by token."""
        assert self.task.language is not None
        answers = generate(
            self.task.language.scorer,
            weights,
            self.dataset.tokenizer(),
            [question for question, _ in self.questions],
            GenerateConfig(tokens=max(len(ids) for _, ids in self.questions) + 1, temperature=0.0, rows=16),
        )
        return sum(answer.ids == ids for answer, (_, ids) in zip(answers, self.questions, strict=True))


def with_rate(experiment: Experiment, run: Run) -> Experiment:
    """The same experiment at the rate and the seed of a run, which its compiled step takes as data."""
    cfg = experiment.cfg
    optimizer = dataclasses.replace(cfg.optimizer, learning_rate=run.rate)
    cfg = dataclasses.replace(cfg, optimizer=optimizer, train=dataclasses.replace(cfg.train, seed=run.seed))
    return experiment._replace(task=experiment.task._replace(cfg=cfg))


def planned_mebibytes(experiment: Experiment) -> float:
    arguments = abstract_state(experiment), abstract_frozen(experiment), abstract_batch(experiment)
    stats = jitted_step(experiment).lower(*arguments).compile().memory_analysis()
    whole = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
    return (whole - stats.alias_size_in_bytes) / 2**20


def asked(dataset: Dataset) -> list[tuple[list[int], list[int]]]:
    """(prompt, response without the end of text) of each conversation of a set's training split, each of one turn:
    what is scored of it is its end."""
    split, pairs = dataset.split("train"), []
    for start, stop in itertools.pairwise(split.document_starts):
        where = np.array([start]), np.array([stop - start])
        ids, first = split.take(*where).tolist(), int((split.weights(*where) > 0).argmax())
        pairs.append((ids[:first], ids[first:-1]))
    return pairs


# The runs ---------------------------------------------------------------------------------------------------------


class Table:
    """The runs that have ended, in a file that gets a line as each ends."""

    def __init__(self, path: Path) -> None:
        self._path, self.results = path, dict[Run, Result]()
        if not path.exists():
            path.write_text(",".join(Run._fields + Result._fields) + "\n")
        with path.open() as file:
            for row in csv.DictReader(file):
                run = Run(row["set"], row["method"], float(row["rate"]), int(row["seed"]))
                kinds = Result.__annotations__
                self.results[run] = Result(**{name: kinds[name](row[name]) for name in Result._fields})

    def add(self, run: Run, result: Result) -> None:
        self.results[run] = result
        with self._path.open("a") as file:
            csv.writer(file).writerow([*run, *result])
        print(run, result, flush=True)


def walk(table: Table, name: str, method: str, bench: Bench) -> float:
    """The rate whose neighbours, a factor of three away, are both worse."""

    @functools.cache
    def loss(exponent: int) -> float:
        run = Run(name, method, float(f"{METHODS[method].first_rate * FACTOR**exponent:.3g}"), CHOOSING_SEED)
        if run not in table.results:
            table.add(run, bench.train(run))
        loss = table.results[run].valid
        return loss if np.isfinite(loss) else np.inf

    here = 0
    for step in (1, -1):
        while loss(here + step) < loss(here):
            here += step
    return float(f"{METHODS[method].first_rate * FACTOR**here:.3g}")


def train(table: Table, arguments: argparse.Namespace) -> None:
    recipe = PrepareConfig(
        inputs=(arguments.stories,),
        tokenizer=TokenizerConfig(kind="file", path=f"{arguments.base}/tokenizer"),
        valid_fraction=0.15,
    )
    prepare(recipe, str(arguments.out / "data/stories"))
    for method in arguments.methods:
        rate = None
        for name, file in arguments.sets.items():
            cfg = make_config(arguments.base, arguments.out, file, name, METHODS[method])
            bench = Bench(cfg, arguments.out / "data/stories")
            if (untuned := Run(name, UNTUNED, 0.0, 0)) not in table.results:
                table.add(untuned, bench.measured(initial_state(bench.experiment).params, 0.0, counts=True))
            rate = rate or walk(table, name, method, bench)
            for seed in range(arguments.seeds):
                run = Run(name, method, float(f"{rate * SETS[name].times:.3g}"), seed)
                if run not in table.results:
                    table.add(run, bench.train(run))


# Reporting --------------------------------------------------------------------------------------------------------


def report(table: Table, sets: Sequence[str], methods: Sequence[str]) -> None:
    """Print a table of Markdown for each set: means and standard errors over the seeds of each method's best rate."""
    for name in sets:
        base = table.results[Run(name, UNTUNED, 0.0, 0)]
        print(f"\n{name}: {base.asked} conversations trained on\n")
        print("| | rate | parameters | response loss | of the drop | answers exact | old text | CPU s a step | MiB |")
        print("| --- |" + " --- |" * 8)
        print(f"| not tuned | | | {base.valid:.3f} | | {base.exact:.0f} | {base.stories:.3f} | | |")
        whole = base.valid - statistics.mean(result.valid for _, result in seeds(table, name, "all weights"))
        for method in methods:
            runs = seeds(table, name, method)
            if not runs:
                continue
            results = [result for _, result in runs]
            drop = (base.valid - statistics.mean(result.valid for result in results)) / whole
            cells = [
                f"{runs[0][0].rate:g}",
                f"{results[0].parameters:,}",
                spread([result.valid for result in results]),
                f"{drop:.0%}",
                " ".join(f"{result.exact:.0f}" for result in results) + f" of {results[0].asked}",
                spread([result.stories for result in results]),
                f"{statistics.median(result.cpu_seconds for result in results):.3f}",
                f"{results[0].mebibytes:.0f}",
            ]
            print(f"| {method} | {' | '.join(cells)} |")


def seeds(table: Table, name: str, method: str) -> list[tuple[Run, Result]]:
    """The runs of a method's seeds, in their order; the seed that chose the rate is none of them."""
    return [
        (run, result)
        for run, result in sorted(table.results.items())
        if (run.set, run.method) == (name, method) and run.seed != CHOOSING_SEED
    ]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True, help="the work directory of a trained model")
    parser.add_argument("--stories", required=True, help="texts such as it was trained on")
    parser.add_argument("--set", dest="sets", action="append", required=True, help=f"NAME=FILE, of {', '.join(SETS)}")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="of what has been trained; train nothing")
    arguments = parser.parse_args()
    arguments.sets = dict(one.split("=", 1) for one in arguments.sets)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = Table(arguments.out / "runs.csv")
    if not arguments.report:
        start_up.configure_jax()
        train(table, arguments)
    report(table, list(arguments.sets), arguments.methods)


if __name__ == "__main__":
    main()
