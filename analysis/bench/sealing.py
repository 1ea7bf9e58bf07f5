"""What a save costs the steps around it: how long the loop stands still, and how much slower steps are until the seal.

    python -m analysis.bench.sealing [--config=configs/gpt2.py:124m] [--set KEY=VALUE ...] [--saves=3]

Convention: steps on random tokens that are already on the device, each timed until its results are there. Quiet steps
are ten before each save; a save's steps are those until it is sealed and verified. What a save costs is the time that
the loop stood still and what its steps took beyond the median quiet step; it is given as a share of 100 quiet steps, as
where every 100th saves. The first step after a save works in memory that is new; what writing and hashing take from
steps is seen in the later ones, which are set against quiet ones, all saves together. With PJRT_NPROC=1 in front XLA
leaves all cores but one to them. CPU-seconds are those of the process until the seal, less those of as many quiet
steps. Memory is the largest resident set before the first save and at the end.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from lmjax.process import start_up

if __name__ == "__main__":
    start_up.tune_allocator()  # starts this process again, so before anything heavy is imported

import jax

from analysis.bench.gpt import random_batch
from analysis.bench.stack import resident
from lmjax.config import load
from lmjax.devices.place import shard_batch
from lmjax.record.checkpoint import Checkpoints
from lmjax.record.config import CheckpointConfig
from lmjax.registry import without_data
from lmjax.run import assemble

QUIET_STEPS = 10
SHAPE = ("model.dtype=float32", "train.batch=1")
"""The shortest step at the config's own length: what a save costs is largest beside it."""


class Save(NamedTuple):
    blocked: float
    """Seconds for which the loop stood still."""
    sealing: float
    """Seconds from there to the seal, in which the loop went on."""
    slower: float
    """Seconds that the steps until then took beyond quiet ones."""
    first: float
    """Of these the first step's."""
    cpu: float
    """CPU-seconds beyond those of quiet steps."""


class Loop:
    """Steps of one run, timed one by one."""

    def __init__(self, config: str, settings: list[str]) -> None:
        cfg = load(config, settings)
        experiment = assemble.assemble(without_data(cfg))
        self.step = assemble.compiled_step(experiment)
        self.batch = shard_batch(random_batch(cfg, 0), None, cfg.train.batch)
        self.state = assemble.initial_state(experiment)
        self.megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)) / 1e6
        self.later_steps: list[float] = []
        """Seconds of steps beside a save, but for each one's first."""
        self.seconds()  # which compiles
        start_up.give_back_memory()  # as a run does, here and after a save

    def seconds(self) -> float:
        begin = time.perf_counter()
        self.state, metrics = self.step(self.state, {}, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - begin

    def save(self, checkpoints: Checkpoints, number: int, quiet: float, quiet_cpu: float) -> Save:
        begin, cpu = time.perf_counter(), time.process_time()
        checkpoints.save(number, self.state, {})
        start_up.give_back_memory()
        blocked, taken = time.perf_counter() - begin, []
        while checkpoints.sealed_step != number:
            taken.append(self.seconds())
            checkpoints.poll()
        sealing = time.perf_counter() - begin - blocked
        used = time.process_time() - cpu - len(taken) * quiet_cpu
        self.later_steps += taken[1:]
        beyond = [seconds - quiet for seconds in taken]  # none where the seal was there at once
        return Save(blocked, sealing, sum(beyond), sum(beyond[:1]), used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/gpt2.py:124m")
    parser.add_argument("--set", nargs="*", default=(), metavar="KEY=VALUE")
    parser.add_argument("--saves", type=int, default=3)
    arguments = parser.parse_args()
    start_up.run_in_turn()  # as a run does
    loop = Loop(arguments.config, [*SHAPE, *arguments.set])
    before, quiet, saves = resident(), [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", CheckpointConfig())
        for number in range(1, arguments.saves + 1):
            cpu = time.process_time()
            quiet += [loop.seconds() for _ in range(QUIET_STEPS)]
            quiet_cpu = (time.process_time() - cpu) / QUIET_STEPS
            saves.append(loop.save(checkpoints, number, statistics.median(quiet), quiet_cpu))
        checkpoints.wait()
    step = statistics.median(quiet)
    blocked = statistics.median(save.blocked for save in saves)
    cost = statistics.median(save.blocked + save.slower for save in saves)
    print(f"{jax.devices()[0].device_kind}: a state of {loop.megabytes:,.0f} MB, steps of {step:.2f} s")
    for name, values in zip(Save._fields, zip(*saves, strict=True), strict=True):
        print(f"{name:8} {statistics.median(values):7.2f} s  ({min(values):.2f} to {max(values):.2f})")
    print(f"a save every 100 steps costs {cost / (100 * step):.1%} of their time; it blocks {blocked / step:.2f} steps")
    if loop.later_steps:
        later = statistics.median(loop.later_steps)
        print(f"after the first, a step beside a save takes {later / step:.2f} of a quiet one")
    print(f"largest resident set: {before:,.0f} MB before the first save, {resident():,.0f} MB with them")


if __name__ == "__main__":
    main()
