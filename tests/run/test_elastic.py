"""A run may go on with other processes, other devices and another layout: same state, same samples, each of them once.

The short form runs always. `pytest -n 0 -m slow tests/run/test_elastic.py` goes through every change of processes,
devices and layouts, and through what one process can do to the others.
"""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from lmjax.record import inspect, steps
from lmjax.record.ledger import check_ledger, effective_history
from lmjax.record.tracking import read_jsonl

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 24, 8
SETTINGS = (
    f"--config.train.steps={STEPS}",
    "--config.train.microbatches=1",  # so that eight devices have a row each
    "--config.train.evaluate_every=12",
    "--config.train.sample.tokens=4",
    "--config.checkpoint.every=8",
    "--config.model.layers=1",
    "--config.model.heads=4",  # of which four devices have one each
    "--config.model.vocab=264",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_texts(directory, seed=0)
    return directory


def write_texts(directory: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name in ("a", "b"):
        (directory / name).mkdir(parents=True)
        for number in range(20):
            (directory / name / f"{number}.txt").write_text(" ".join(rng.choice(list("abcdefgh"), 200)))


class Leg(NamedTuple):
    """One attempt at a run."""

    processes: int = 1
    devices: int = 1
    """Of each process."""
    mesh: str = ""
    """Settings of the mesh, as in "fsdp=2 tensor=2"."""
    faults: str = ""
    code: int = 0


def command(leg: Leg, *arguments: str) -> list[str]:
    """Python with these arguments in every process of a leg."""
    launcher = ["launch", "local", f"--processes={leg.processes}", f"--devices-per-process={leg.devices}", "--"]
    return [sys.executable, "-m", *launcher, sys.executable, *arguments]


def training(corpus: Path, workdir: Path, leg: Leg) -> list[str]:
    mesh = [f"--config.mesh.{setting}" for setting in leg.mesh.split()]
    return ["-m", "lmjax", "train", f"--config=tests/tiny_config.py:{corpus}", f"--workdir={workdir}", *SETTINGS, *mesh]


def environment(leg: Leg) -> dict[str, str]:
    """XLA's optimizations would cost more than they save."""
    return os.environ | {"LMJAX_FAULTS": leg.faults, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def launch(leg: Leg, *arguments: str) -> str:
    """What a leg printed; it must end as it says."""
    done = subprocess.run(
        command(leg, *arguments), cwd=ROOT, env=environment(leg), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == leg.code, done.stdout + done.stderr
    return done.stdout + done.stderr


def attempt(corpus: Path, workdir: Path, leg: Leg, *settings: str) -> str:
    """What one attempt at the run printed."""
    return launch(leg, *training(corpus, workdir, leg), *settings)


@pytest.fixture(scope="module")
def reference(corpus: Path) -> Path:
    """The same run on one device, never interrupted."""
    attempt(corpus, corpus / "reference", Leg())
    return corpus / "reference"


def assert_same_run(workdir: Path, reference: Path, rel: float = 1e-5) -> None:
    """The ledger of the reference, every sample once and in order, and its losses up to rounding."""
    assert check_ledger(workdir / "ledger.jsonl") == []
    history, expected = (effective_history(path / "ledger.jsonl") for path in (workdir, reference))
    assert [(entry.step, *entry.data) for entry in history] == [(entry.step, *entry.data) for entry in expected]
    samples = [sample for entry in history for sample in range(entry.first_sample, entry.first_sample + entry.count)]
    assert samples == list(range(STEPS * BATCH))
    for row, wanted in zip(read_jsonl(workdir / "metrics.jsonl"), read_jsonl(reference / "metrics.jsonl"), strict=True):
        numbers = {key: value for key, value in wanted.items() if key.endswith(("/loss", "/grad_norm", "/lr"))}
        assert {key: row[key] for key in numbers} == pytest.approx(numbers, rel=rel, abs=0)
    assert steps.verify(workdir) == []


def test_from_eight_devices_to_two_processes_to_one(corpus: Path, reference: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    attempt(corpus, workdir, Leg(1, 8, faults="kill@checkpoint.after_seal:1", code=137))
    output = attempt(corpus, workdir, Leg(2, 1, "fsdp=2", faults="terminate@step:11:1", code=75))
    assert "from step 8" in output
    assert_stopped_together(workdir, output, 1, 11)
    output = attempt(corpus, workdir, Leg(2, 1, faults="kill@step:22:1", code=137))
    assert re.search(r"\[0\] lmjax: error: process 0 of 2: .*process.* is gone", output)
    output = attempt(corpus, workdir, Leg())
    assert re.search(r"from step 1[126]\b", output)  # that of step 16 may not have been sealed yet
    assert_same_run(workdir, reference)


def assert_stopped_together(workdir: Path, output: str, process: int, at: int) -> None:
    """After a signal to one process during step `at` all saved that step or the one after."""
    assert re.search(rf"\[{process}\] lmjax: process {process} of \d: SIGTERM: saving at the next step", output)
    saved = re.search(r"\[0\] preempted: step (\d+) is saved", output)
    assert saved and int(saved[1]) in (at, at + 1)
    assert inspect.inspect(workdir)["step"] == int(saved[1])


# The long form --------------------------------------------------------------------------------------------------------

PROCESSES = [
    Leg(1, 1, faults="kill@step:7", code=137),
    Leg(2, 1, faults="kill@checkpoint.after_seal:1:0", code=137),  # process 0 seals
    Leg(4, 1, "fsdp=2", faults="kill@step:20:3", code=137),
    Leg(1, 1),
]
DEVICES = [
    Leg(1, 8, "fsdp=2 tensor=2", faults="kill@checkpoint.after_seal:1", code=137),
    Leg(1, 4, "fsdp=4", faults="kill@step:12", code=137),
    Leg(1, 2, "tensor=2", faults="kill@step:20", code=137),
    Leg(1, 1),
]
ACROSS = [
    Leg(2, 2, "tensor=4", faults="kill@checkpoint.before_seal:2:1", code=137),
    Leg(4, 2, "fsdp=2 context=2 tensor=2", faults="terminate@step:13:2", code=75),
    Leg(2, 4, "data=2 fsdp=4", faults="kill@checkpoint.write:1:0", code=137),
    Leg(1, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("legs", [PROCESSES, DEVICES, ACROSS], ids=["processes", "devices", "across"])
def test_every_change_on_the_way(corpus: Path, reference: Path, tmp_path: Path, legs: list[Leg]) -> None:
    """At every change the next layout restores the state to the bit: saved again from there, it has the same hashes."""
    workdir = tmp_path / "run"
    for number, leg in enumerate(legs):
        if number and (workdir / "checkpoints").exists():
            assert_restores_equal(workdir, leg, tmp_path / f"again-{number}")
        attempt(corpus, workdir, leg)
    assert_same_run(workdir, reference)


def assert_restores_equal(workdir: Path, leg: Leg, out: Path) -> None:
    """Restored onto the next mesh and saved again it is the same; from there one step is that of one device."""
    there, alone = restore(workdir, leg, out / "there"), restore(workdir, Leg(), out / "alone")
    assert there == pytest.approx(alone, rel=1e-5)
    saved, *found = (inspect.inspect(path, hashes=True) for path in (workdir, out / "there", out / "alone"))
    for again in found:
        assert (again["hashes"], again["step"], again["meta"]) == (saved["hashes"], saved["step"], saved["meta"])


def restore(workdir: Path, leg: Leg, out: Path) -> dict[str, float]:
    """The loss and gradient norm of the next step."""
    output = launch(leg._replace(faults="", code=0), "tests/record/save_again.py", str(workdir), str(out), leg.mesh)
    return json.loads(next(line.removeprefix("[0] ") for line in output.splitlines() if line.startswith("[0] {")))


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(corpus: Path, reference: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    output = attempt(corpus, workdir, Leg(4, 1, faults="terminate@step:11:2", code=75))
    assert_stopped_together(workdir, output, 2, 11)
    attempt(corpus, workdir, Leg())
    assert_same_run(workdir, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "code", "line"),
    [
        ("stall@step:11:1", 6, "no progress for 60 s during step 1[12]"),
        ("raise@step:11:1", 1, r"\[1\] lmjax: error: process 1 of 2: RuntimeError: injected"),
        ("disk_full@checkpoint.write:1:1", 4, r"\[1\] lmjax: error: process 1 of 2: checkpoint .* was not saved"),
        ("kill@step:11:0", 137, r"\[1\] lmjax: error: process 1 of 2: .*process.* is gone"),
    ],
)
def test_one_process_in_trouble_ends_all(corpus: Path, tmp_path: Path, faults: str, code: int, line: str) -> None:
    output = attempt(corpus, tmp_path / "run", Leg(2, 1, faults=faults, code=code), "--config.train.step_timeout=60")
    assert re.search(line, output), output


@pytest.mark.slow
def test_kills_at_any_time(corpus: Path, reference: Path, tmp_path: Path) -> None:
    """Of any process or of the launcher, and each time the run goes on with other numbers of processes and devices."""
    workdir, rng = tmp_path / "run", random.Random(0)
    for processes in (2, 4, 1, 4, 2, 4):
        leg = Leg(processes, rng.choice([1, 2]))
        launcher = subprocess.Popen(command(leg, *training(corpus, workdir, leg)), cwd=ROOT, env=environment(leg))
        time.sleep(rng.uniform(1, 15))
        listed = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice([launcher.pid, *map(int, listed.stdout.split())]), signal.SIGKILL)
        launcher.wait(timeout=60)
    attempt(corpus, workdir, Leg())
    assert_same_run(workdir, reference)


@pytest.fixture(scope="module")
def pair(corpus: Path) -> Path:
    """The same run on two processes, never interrupted."""
    attempt(corpus, corpus / "pair", Leg(2, 1))
    return corpus / "pair"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "process"),
    [*itertools.product(["write", "before_seal", "after_seal"], [0, 1]), ("retain", 0)],  # process 0 alone retains
)
def test_a_kill_at_any_moment_of_a_save(corpus: Path, pair: Path, tmp_path: Path, hook: str, process: int) -> None:
    """There is no seal, or a good one, and then as many processes end with the same bits."""
    workdir = tmp_path / "run"
    attempt(corpus, workdir, Leg(2, 1, faults=f"kill@checkpoint.{hook}:2:{process}", code=137))
    assert steps.verify(workdir / "checkpoints" / "8") == []
    attempt(corpus, workdir, Leg(2, 1))
    assert_same_run(workdir, pair, rel=0.0)
    found, expected = (inspect.inspect(path, hashes=True)["hashes"] for path in (workdir, pair))
    assert found == expected


@pytest.mark.slow
def test_contradicting_settings_are_named(corpus: Path, tmp_path: Path) -> None:
    script = (
        "import os, subprocess, sys; "
        "rate = 1e-3 * (1 + int(os.environ['LMJAX_PROCESS_ID'])); "
        "sys.exit(subprocess.run([sys.executable, '-m', 'lmjax', 'train', *sys.argv[1:], "
        "f'--config.optimizer.learning_rate={rate}']).returncode)"
    )
    output = launch(Leg(2, code=2), "-c", script, *training(corpus, tmp_path / "run", Leg())[3:])
    assert "process 1 of 2: optimizer.learning_rate is 0.002 here, but 0.001 at process 0" in output


@pytest.mark.slow
def test_other_data_at_one_process_are_named(tmp_path: Path) -> None:
    """Under a relative path on disks of their own."""
    for process in range(2):
        write_texts(tmp_path / str(process), seed=process)
    script = (
        "import os, subprocess, sys; os.chdir(sys.argv[1] + os.environ['LMJAX_PROCESS_ID']); "
        "sys.exit(subprocess.run([sys.executable, '-m', 'lmjax', 'train', *sys.argv[2:]]).returncode)"
    )
    settings = [f"--config={ROOT}/tests/tiny_config.py:.", f"--workdir={tmp_path / 'run'}", *SETTINGS]
    output = launch(Leg(2, code=3), "-c", script, f"{tmp_path}/", *settings)
    assert "[1] lmjax: error: process 1 of 2: the data here are not those of process 0" in output
