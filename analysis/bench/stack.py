"""Tokens per second of many runs of one shape: one after another, and together.

    python -m analysis.bench.stack [--runs=8] [--steps=30] [--rounds=5]
    python -m analysis.bench.stack --commands [--steps=200] [--rounds=3]

The first times the train step alone, on random tokens that are already on the device, in one process: each run takes
`steps` steps and reads the metrics of each, as a run does. The second times whole `lmjax train` commands, from the
first start to the last end, with compiled programs in the cache: one after another, as many at a time as there are
cores with a core for each (a sweep without stacks), and one command for all.

Ways alternate, so that whatever else the machine does falls on all of them. Convention: all tokens of all runs, B x T,
over the seconds that a way took; figures are medians over rounds, ratios medians of each round's ratio to the first
way. Memory is the largest resident set, for the step of a process with one way in it (--only), for commands summed
over those at a time.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import queue
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.process import start_up

if __name__ == "__main__":
    start_up.tune_allocator()  # starts this process again, so before anything heavy is imported

import jax

from analysis.bench.gpt import random_batch
from lmjax.config import Config, load
from lmjax.devices.place import shard_batch
from lmjax.metrics import finish
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.run.stack import SharedStep, SideBySide, Stacked

CONFIG = "configs/sweeps/cpu_isoflop.py"
SHAPE = ("model.embed=128", "model.layers=4", "model.heads=2", "model.mlp=512")
"""919k parameters with the config's vocabulary of 1024; the config has B 8 x T 128."""

Way = Callable[[], float]
"""Returns the megabytes that it took."""


# The step -------------------------------------------------------------------------------------------------------------


class Runs:
    """Runs that differ in their seeds, and take steps in one way or another."""

    def __init__(self, cfgs: Sequence[Config], steps: int) -> None:
        self.experiments = [assemble.assemble(without_data(cfg)) for cfg in cfgs]
        self.states = [assemble.initial_state(experiment) for experiment in self.experiments]
        self.batches = [shard_batch(random_batch(cfg, seed), None, cfg.train.batch) for seed, cfg in enumerate(cfgs)]
        self.steps = steps

    def alone(self) -> Way:
        step = assemble.compiled_step(self.experiments[0])

        def way() -> float:
            for number in range(len(self.states)):
                self.take_steps(number, lambda number, inputs: step(*inputs))
            return resident()

        return way

    def together(self, kind: type[SharedStep]) -> Way:
        step = kind(range(len(self.states)))
        step.prepare(self.experiments[0])

        def way() -> float:
            with concurrent.futures.ThreadPoolExecutor(len(self.states)) as pool:
                list(pool.map(lambda number: self.take_steps(number, step), range(len(self.states))))
            return resident()

        return way

    def take_steps(self, number: int, step: Any) -> None:
        pending = None
        for _ in range(self.steps):
            self.states[number], metrics = step(number, (self.states[number], {}, self.batches[number]))
            if pending is not None:
                finish(pending)
            pending = metrics
        jax.block_until_ready((self.states[number], pending))


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def step_ways(cfg: Config, arguments: argparse.Namespace) -> dict[str, Way]:
    seeded = [
        dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=seed)) for seed in range(arguments.runs)
    ]
    runs = Runs(seeded, arguments.steps)
    return {
        "one after another": runs.alone(),
        "side by side": runs.together(SideBySide),
        "stacked": runs.together(Stacked),
    }


# Commands -------------------------------------------------------------------------------------------------------------


def command_ways(arguments: argparse.Namespace) -> dict[str, Way]:
    """Each trains in work directories of its own, evaluates at the end and writes its report."""
    settings = [*arguments.set, f"train.steps={arguments.steps}", "train.evaluate_batches=4"]
    shared = ["train", f"--config={arguments.config}", *(f"--config.{setting}" for setting in settings)]

    def own(folder: str) -> list[list[str]]:
        return [[f"--config.train.seed={seed}", f"--workdir={folder}/{seed}"] for seed in range(arguments.runs)]

    def apart(at_a_time: int) -> float:
        cores = sorted(os.sched_getaffinity(0))
        free: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        for slot in range(at_a_time):
            free.put(set(cores[slot::at_a_time]))

        def one(words: list[str]) -> float:
            share = free.get()
            try:
                return lmjax([*shared, *words], share)
            finally:
                free.put(share)

        with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
            return at_a_time * max(pool.map(one, own(folder)))

    def together() -> float:
        with tempfile.TemporaryDirectory() as folder:
            words = [word for run in own(folder) for word in ("--", *run)]
            return lmjax([*shared, *words], os.sched_getaffinity(0))

    cores = len(os.sched_getaffinity(0))
    return {
        "one after another": functools.partial(apart, 1),
        f"{cores} at a time": functools.partial(apart, cores),
        "one command": together,
    }


def lmjax(words: Sequence[str], cores: set[int]) -> float:
    """Run a command on these cores; returns the megabytes that it took."""
    command = ["taskset", "--cpu-list", ",".join(map(str, cores)), sys.executable, "-m", "lmjax", *words]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {said.read()[-500:]}")
    return usage.ru_maxrss / 1e3


# Measuring ------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", action="store_true", help="time whole commands")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, help="of each run, in each round; default: 30, of commands 200")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", metavar="WAY", help="this one alone, for what it takes in memory")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--set", nargs="*", default=SHAPE, metavar="KEY=VALUE")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or (200 if arguments.commands else 30)
    cfg = load(arguments.config, arguments.set)
    ways = command_ways(arguments) if arguments.commands else step_ways(with_vocab(cfg), arguments)
    if arguments.only is not None:
        ways = {arguments.only: ways[arguments.only]}
    found = timed(ways, arguments.rounds)
    tokens = arguments.runs * arguments.steps * cfg.train.batch * cfg.data.seq_len
    first = next(iter(found.values()))
    for name, ones in found.items():
        rate = statistics.median(tokens / one.seconds for one in ones)
        ratio = statistics.median(before.seconds / one.seconds for before, one in zip(first, ones, strict=True))
        memory = max(one.megabytes for one in ones)
        told = f"{memory:8,.0f} MB" if arguments.commands or arguments.only else ""
        print(f"{name:18} {rate:10,.0f} tokens/s  x {ratio:.2f} {told}")


def with_vocab(cfg: Config) -> Config:
    """The vocabulary that the recipe asks for, filled in."""
    vocab = next(source.prepare.tokenizer.vocab for source in cfg.data.sources.values() if source.prepare)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab=vocab))


class Taken(NamedTuple):
    seconds: float
    megabytes: float


def timed(ways: Mapping[str, Way], rounds: int) -> dict[str, list[Taken]]:
    """What each way took in each round. A round before them, which compiles, is left out."""
    taken: dict[str, list[Taken]] = {name: [] for name in ways}
    for round, (name, way) in itertools.product(range(rounds + 1), ways.items()):
        start = time.perf_counter()
        megabytes = way()
        taken[name] += [Taken(time.perf_counter() - start, megabytes)] * bool(round)
    return taken


if __name__ == "__main__":
    main()
