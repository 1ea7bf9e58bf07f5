"""Sweeps on a real Slurm cluster: trained, preempted, cut off, stopped, failed, and to the same bits as undisturbed.

Run with  pytest -n 0 -m slow tests/launch/test_slurm_cluster.py  where SLURM_CONF names a cluster of at least two idle
nodes, whose first JAX can reach by its name, and its administrator runs the tests; else they are skipped. slurm_up.sh
makes such a cluster of one machine.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from launch import status
from lmjax.record import inspect
from lmjax.record.ledger import check_ledger
from lmjax.record.tracking import read_jsonl

ROOT = Path(__file__).parents[2]
STEPS = 200
LONG_SECONDS = 90.0
"""Slurm looks every half a minute whether a job's time is up: a run of this length is still at work then."""
SETTINGS = (
    "--config.train.microbatches=1",
    "--config.train.evaluate_every=1000",
    "--config.train.sample.tokens=4",
    "--config.checkpoint.every=100",
    "--config.model.layers=1",
    "--config.model.vocab=264",
)
PATIENCE = 600.0


def slurm_answers() -> bool:
    try:
        done = subprocess.run(["sinfo", "--noheader", "--format=%D"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and sum(map(int, done.stdout.split())) >= 2


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not slurm_answers(), reason="no Slurm cluster answers; see the top of this file"),
]


def tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def wait_until(what: Callable[[], bool], patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not what():
        assert time.monotonic() < end
        time.sleep(0.2)


class Sweep(NamedTuple):
    """One that was launched."""

    directory: Path
    cells: Path
    corpus: Path

    def launch(self, *flags: str, engine: str = "slurm") -> str:
        """What `launch sweep` prints."""
        config = f"tests/tiny_config.py:{self.corpus}"
        command = ["sweep", config, f"--cells={self.cells}", f"--out={self.directory}", f"--engine={engine}"]
        return self.command(*command, "--nodes=2", *SETTINGS, *flags)

    def command(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launch", *words], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0 or words[0] == "status", done.stderr
        return done.stdout

    @property
    def job(self) -> int:
        """Slurm's number of the last array."""
        return json.loads((self.directory / "engine" / "slurm.json").read_text())[-1][0]

    def state(self, cell: int = 0) -> str:
        return status.rows(self.directory)[cell].state

    def step(self, cell: int = 0) -> int:
        return max((line.get("step", 0) for line in self.metrics(cell)), default=0)

    def metrics(self, cell: int = 0) -> list[dict[str, Any]]:
        path = self.workdir(cell) / "metrics.jsonl"
        return list(read_jsonl(path)) if path.exists() else []

    def workdir(self, cell: int = 0) -> Path:
        return self.directory / "cells" / f"{cell:04d}"

    def log(self, cell: int = 0) -> str:
        return (self.directory / "logs" / f"{cell:04d}.log").read_text()

    def slurm_state(self, task: int = 0) -> str:
        """RUNNING, PENDING, ...; empty once Slurm has forgotten it."""
        listed = tool("squeue", "--noheader", "--array", "--states=all", "--format=%i %T", "--me")
        return dict(line.split() for line in listed.splitlines()).get(f"{self.job}_{task}", "")

    def release(self) -> None:
        """Have a requeued task start now; Slurm would wait two minutes."""
        wait_until(lambda: self.slurm_state() == "PENDING")
        time.sleep(2)  # nodes refuse credentials of the second in which they revoked the job's
        tool("scontrol", "update", f"jobid={self.job}_0", "StartTime=now")

    def finish(self, cells: int = 1) -> None:
        wait_until(lambda: all(self.state(cell) == "done" for cell in range(cells)))
        wait_until(lambda: all(self.slurm_state(task) in ("", "COMPLETED") for task in range(cells)))

    def hashes(self, cell: int = 0) -> dict[str, str]:
        """Of the last checkpoint; every sample was read once."""
        assert check_ledger(self.workdir(cell) / "ledger.jsonl") == []
        return inspect.inspect(self.workdir(cell), hashes=True)["hashes"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for name in ("a", "b"):
        (directory / name).mkdir()
        for number in range(20):
            (directory / name / f"{number}.txt").write_text(" ".join(rng.choice(list("abcdefgh"), 200)))
    return directory


def sweep_of(folder: Path, corpus: Path, *steps: int) -> Sweep:
    """A cell for each number of steps."""
    (folder / "cells.json").write_text(json.dumps([{"train.steps": number} for number in steps]))
    return Sweep(folder / "sweep", folder / "cells.json", corpus)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    sweep = sweep_of(tmp_path_factory.mktemp("undisturbed"), corpus, STEPS, STEPS + 1)
    assert "an array of 2 cells" in sweep.launch("--max-running=1")
    sweep.finish(cells=2)
    return sweep


@pytest.fixture
def sweep(corpus: Path, tmp_path: Path) -> Iterator[Sweep]:
    """Of one cell; nothing of it is left in the queue."""
    sweep = sweep_of(tmp_path, corpus, STEPS)
    yield sweep
    tool("scancel", "--quiet", str(sweep.job))


def test_an_array_trains_its_cells_on_two_nodes_each_the_dearest_first(undisturbed: Sweep) -> None:
    for cell in (0, 1):
        assert "of 2: coordinator n0:" in undisturbed.log(cell) and "(from Slurm)" in undisturbed.log(cell)
        assert undisturbed.step(cell) == STEPS + cell and undisturbed.hashes(cell)
    first, last = ([line["time"] for line in undisturbed.metrics(cell) if "time" in line] for cell in (1, 0))
    assert max(first) < min(last)  # one at a time
    assert "2 of 2 done" in undisturbed.command("status", str(undisturbed.directory))
    assert "Slurm job" not in undisturbed.launch()  # nothing is left to do


def disturbed(sweep: Sweep, disturb: Callable[[], object]) -> None:
    sweep.launch()
    wait_until(lambda: sweep.step() > 20)
    disturb()
    sweep.release()
    assert sweep.state() != "done"
    sweep.finish()
    assert status.rows(sweep.directory)[0].attempts == 2


def test_a_requeued_cell_goes_on(sweep: Sweep, undisturbed: Sweep) -> None:
    """As when the scheduler takes its nodes away for another job."""
    disturbed(sweep, lambda: tool("scontrol", "requeue", f"{sweep.job}_0"))
    assert "SIGTERM: saving" in sweep.log()
    assert sweep.hashes() == undisturbed.hashes()


def test_a_cell_that_loses_a_node_goes_on(sweep: Sweep, undisturbed: Sweep) -> None:
    try:
        disturbed(sweep, lambda: tool("scontrol", "update", "nodename=n1", "state=down", "reason=test"))
    finally:
        # Refused where the cluster has taken it back by itself.
        subprocess.run(["scontrol", "update", "nodename=n1", "state=resume"], capture_output=True, timeout=60)
    assert sweep.hashes() == undisturbed.hashes()


def test_a_cell_that_loses_a_process_goes_on(sweep: Sweep, undisturbed: Sweep) -> None:
    """Without notice, and one alone."""

    def kill() -> None:
        workdir = f"--workdir={sweep.workdir()}"
        trainers = [int(pid) for pid in tool("pgrep", "--full", f"lmjax train .*{workdir}").split()]
        environments = {pid: Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in trainers}
        (victim,) = [pid for pid, variables in environments.items() if "SLURM_PROCID=1" in variables]
        os.kill(victim, signal.SIGKILL)

    disturbed(sweep, kill)
    assert sweep.hashes() == undisturbed.hashes()


def test_a_cell_whose_time_is_up_saves_and_goes_on(corpus: Path, tmp_path: Path, undisturbed: Sweep) -> None:
    times = [line["time"] for line in undisturbed.metrics() if "perf/step_time" in line]
    steps = max(STEPS, int(LONG_SECONDS * len(times) / (times[-1] - times[0])))
    (tmp_path / "whole").mkdir()
    whole, sweep = sweep_of(tmp_path / "whole", corpus, steps), sweep_of(tmp_path, corpus, steps)

    def shorten() -> None:
        shown = tool("scontrol", "show", "job", f"{sweep.job}_0")
        hours, minutes = map(int, re.findall(r"RunTime=(\d+):(\d+):", shown)[0])
        tool("scontrol", "update", f"jobid={sweep.job}_0", f"TimeLimit={60 * hours + minutes + 2}")
        wait_until(lambda: sweep.slurm_state() == "PENDING")
        tool("scontrol", "update", f"jobid={sweep.job}_0", "TimeLimit=60")

    disturbed(sweep, shorten)
    assert "SIGTERM: saving" in sweep.log()
    whole.launch()
    whole.finish()
    assert sweep.hashes() == whole.hashes()


def test_a_stopped_sweep_saves_and_the_same_command_goes_on(sweep: Sweep, undisturbed: Sweep) -> None:
    sweep.launch()
    wait_until(lambda: sweep.step() > 20)
    assert "asked 1 cell to end" in sweep.command("stop", str(sweep.directory))
    wait_until(lambda: sweep.state() == "preempted")
    wait_until(lambda: sweep.slurm_state() in ("", "FAILED"))  # ended with 75, and did not queue again
    assert "an array of 1 cells" in sweep.launch()
    sweep.finish()
    assert sweep.hashes() == undisturbed.hashes()


def test_a_failed_cell_is_reported_and_started_again_alone(corpus: Path, tmp_path: Path, undisturbed: Sweep) -> None:
    sweep = sweep_of(tmp_path, corpus, STEPS, STEPS + 1)
    obstacle = sweep.workdir(0) / "checkpoints"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("")  # a file where a directory should be
    sweep.launch()
    wait_until(lambda: sweep.state(1) == "done" and sweep.state(0) == "failed")
    shown = sweep.command("status", str(sweep.directory))
    assert "1 of 2 done, 1 failed" in shown and re.search(
        r"failed .* exit code 2: .*0000 is not the work directory of a run", shown
    )
    obstacle.unlink()
    assert "an array of 1 cells" in sweep.launch()
    sweep.finish()
    assert sweep.state(1) == "done" and sweep.hashes(0) == undisturbed.hashes(0)
