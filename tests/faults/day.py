"""A day in the life of a run of two processes, in minutes: all that goes wrong is drawn from a seed.

    python -m tests.faults.day [--minutes=30] [--seed=0]

A run is trained undisturbed, long enough to take a third of the time. Then the same run is started again and again,
each time with one fault at a step that it has not reached, until it is done: killed, stopped, stalled, told to end, out
of disk, or with a bit of its newest checkpoint turned before it starts. It must end with the same bits, never with an
exit code that a scheduler would take for the last word, and its ledger must hold. The last line gives the goodput: the
time of the undisturbed run over that of the disturbed one.
"""

import argparse
import collections
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lmjax.record import seal, steps
from lmjax.record.ledger import read_ledger
from tests.faults.black_box import CONFIG, ENVIRONMENT, ROOT, hashes, lmjax
from tests.faults.conftest import write_corpus

EVERY = 50
"""Steps between checkpoints."""
FAULTS = (
    "kill@step",
    "stop@step",
    "stall@step",
    "terminate@step",
    "disk_full@checkpoint.write",
    "kill@checkpoint.before_seal",
)
FLIP = "a bit of the newest checkpoint"
AGAIN = {4, 6, 75, 137}
"""Exit codes after which the same command goes on."""


class Day:
    """One run of two processes in its work directory."""

    def __init__(self, corpus: Path, workdir: Path, n_steps: int) -> None:
        self.workdir, self.n_steps = workdir, n_steps
        settings = (
            f"train.steps={n_steps}",
            "train.step_timeout=10",
            "train.log_every=50",
            f"train.evaluate_every={10 * EVERY}",
            f"checkpoint.every={EVERY}",
            "model.vocab=264",
        )
        launcher = [sys.executable, "-m", "launch", "local", "--processes=2", "--grace=20", "--"]
        train = ["lmjax", "train", f"--config={CONFIG}:{corpus}", f"--workdir={workdir}"]
        self.command = [*launcher, sys.executable, "-m", *train, *(f"--config.{one}" for one in settings)]

    def start(self, faults: str = "") -> tuple[int, str, float]:
        """(exit code, last line, seconds) of one attempt."""
        begin = time.monotonic()
        environment = os.environ | ENVIRONMENT | {"LMJAX_FAULTS": faults}
        ended = subprocess.run(self.command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
        lines = ended.stderr.strip().splitlines() or [""]
        return ended.returncode, lines[-1], time.monotonic() - begin

    @property
    def reached(self) -> int:
        path = self.workdir / "ledger.jsonl"
        return max((entry.step for entry in read_ledger(path)), default=0) if path.exists() else 0

    def flip(self, rng: random.Random) -> bool:
        """Turn a bit of the newest checkpoint, unless it is the only one."""
        sealed = steps.sealed_steps(self.workdir / "checkpoints")
        if len(sealed) < 2:
            return False
        files = [path for path in Path(sealed[-1]).rglob("*") if path.is_file() and path.stat().st_size]
        path = rng.choice(sorted(path for path in files if path.name != seal.MANIFEST))
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="lmjax-day-") as folder:
        corpus = write_corpus(Path(folder) / "text")
        n_steps = steps_of(20 * parsed.minutes, corpus, Path(folder))
        undisturbed = Day(corpus, Path(folder) / "undisturbed", n_steps)
        code, said, seconds = undisturbed.start()
        assert code == 0, said
        disturbed = Day(corpus, Path(folder) / "disturbed", n_steps)
        spent, happened = live(disturbed, random.Random(parsed.seed))
        same = hashes(disturbed.workdir) == hashes(undisturbed.workdir)
        verified = lmjax("verify", disturbed.workdir)
    counted = ", ".join(f"{count} x {what}" for what, count in sorted(happened.items()))
    print(f"{n_steps} steps: {counted}")
    print(f"the same bits: {same}; lmjax verify: exit code {verified.code} {verified.last}")
    print(f"goodput {seconds / spent:.2f}: {seconds:.0f} s undisturbed, {spent:.0f} s disturbed")
    return 0 if same and verified.code == 0 else 1


def steps_of(seconds: float, corpus: Path, folder: Path) -> int:
    """How many steps take so long."""
    first, second = (Day(corpus, folder / f"rate-{count}", count) for count in (EVERY, 9 * EVERY))
    (_, _, short), (_, _, long) = first.start(), second.start()
    return EVERY * max(4, round(seconds / (long - short) * 8))


def live(day: Day, rng: random.Random) -> tuple[float, collections.Counter[str]]:
    """Start the run until it is done. Returns the seconds of all attempts, and what happened how often."""
    spent, happened = 0.0, collections.Counter[str]()
    while True:
        flipped = rng.random() < 1 / len(FAULTS) and day.flip(rng)
        kind, place = rng.choice(FAULTS), rng.randrange(2)
        soon = day.reached + rng.randint(1, max(2, day.n_steps // 8))
        due = soon if kind.endswith("@step") else rng.randint(1, 3)
        faults = f"{kind}:{due}:{place}"
        code, said, seconds = day.start(faults)
        spent += seconds
        what = f"{faults}, {FLIP}" if flipped else faults
        print(f"{seconds:5.0f} s  exit code {code:3}, step {day.reached:6}  {what}: {said[-150:]}", flush=True)
        happened[FLIP] += flipped
        if code == 0:
            return spent, happened
        assert code in AGAIN or code < 0, said
        happened[kind] += 1


if __name__ == "__main__":
    sys.exit(main())
