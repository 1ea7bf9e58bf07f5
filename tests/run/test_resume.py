"""A killed run goes on as if nothing had happened: same bits, same samples."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from lmjax.errors import StallError
from lmjax.record import inspect, steps
from lmjax.record.ledger import check_ledger, effective_history, read_ledger
from lmjax.run.trained import load_trained
from lmjax.run.workdir import lock

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = Path(__file__).parents[1] / "tiny_config.py"
PIPES: dict[str, Any] = {
    "stdin": subprocess.PIPE,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.STDOUT,
    "text": True,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = np.array("the cat sat on a mat and saw another dog that ran far away from home".split())
    for name in ("a", "b"):
        (directory / name).mkdir()
        for i in range(20):
            text = " ".join(rng.choice(words, rng.integers(20, 200)))
            (directory / name / f"{i}.txt").write_text(text)
    return directory


def start(corpus: Path, workdir: Path, *settings: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lmjax", "train", f"--config={CONFIG}:{corpus}", f"--workdir={workdir}", *settings]
    return subprocess.Popen(command, env={**os.environ, **environment}, **PIPES)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def deterministic_lines(workdir: Path) -> list[dict]:
    """Every logged line, replays included, without the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [
        {key: value for key, value in line.items() if key != "time" and not key.startswith("perf/")}
        for line in lines
        if "event" not in line
    ]


def content_hashes(workdir: Path) -> dict:
    return inspect.inspect(workdir, hashes=True)["hashes"]


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path) -> Path:
    workdir = corpus / "uninterrupted"
    finish(start(corpus, workdir))
    return workdir


def assert_same_run(workdir: Path, reference: Path) -> None:
    """Equal parameters and optimizer state, and every logged value, replayed ones too, equal to the reference's."""
    assert content_hashes(workdir) == content_hashes(reference)
    expected = {json.dumps(line, sort_keys=True) for line in deterministic_lines(reference)}
    found = {json.dumps(line, sort_keys=True) for line in deterministic_lines(workdir)}
    assert found == expected
    assert check_ledger(workdir / "ledger.jsonl") == []
    history = effective_history(workdir / "ledger.jsonl")
    samples = [sample for entry in history for sample in range(entry.first_sample, entry.first_sample + entry.count)]
    assert samples == list(range(60 * 8))
    assert [e.data for e in history] == [e.data for e in effective_history(reference / "ledger.jsonl")]


def kill_at_random_times(corpus: Path, workdir: Path, kills: int, seed: int) -> None:
    """Start the same command again and again; each attempt but the last dies at a random step or moment."""
    rng = random.Random(seed)
    for _ in range(kills):
        done = (
            max((entry.step for entry in read_ledger(workdir / "ledger.jsonl")), default=0) if workdir.exists() else 0
        )
        process = start(corpus, workdir)
        target = rng.randint(max(1, done - 5), 60)
        while process.poll() is None and not _reached(workdir, target):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        process.kill()
        output, _ = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), output
    finish(start(corpus, workdir))


def _reached(workdir: Path, step: int) -> bool:
    ledger = workdir / "ledger.jsonl"
    return ledger.exists() and f'"step": {step},' in ledger.read_text()


def test_a_killed_run_ends_with_the_same_bits(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    kill_at_random_times(corpus, tmp_path / "run", kills=2, seed=1)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_ten_kills_end_with_the_same_bits(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    kill_at_random_times(corpus, tmp_path / "run", kills=10, seed=2)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_sigterm_saves_the_step_and_asks_to_be_run_again(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    output = finish(start(corpus, workdir, LMJAX_FAULTS="terminate@step:23"), code=75)
    assert "step 23 is saved" in output
    assert inspect.inspect(workdir)["step"] == 23
    finish(start(corpus, workdir))
    assert_same_run(workdir, uninterrupted)


@pytest.mark.slow
def test_a_mixture_of_experts_keeps_its_biases(corpus: Path, tmp_path: Path) -> None:
    """They are moved after each update, by no gradient: saved, restored and moved on to the same bits."""
    mixture = [f"--config.model.moe.{setting}" for setting in ("experts=4", "mlp=16", "bias_rate=0.01")]
    short = ["--config.train.steps=12", "--config.checkpoint.every=4", "--config.train.evaluate_every=12"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(corpus, whole, *mixture, *short))
    finish(start(corpus, cut, *mixture, *short, LMJAX_FAULTS="terminate@step:7"), code=75)
    finish(start(corpus, cut, *mixture, *short))
    assert content_hashes(cut) == content_hashes(whole)
    bias_LE = load_trained(cut).params["segments"]["0"]["0"]["moe"]["bias"]
    moved_LE = np.asarray(bias_LE) / 0.01
    np.testing.assert_allclose(moved_LE, np.round(moved_LE), atol=1e-3)
    assert np.abs(moved_LE).max() > 1.5


def test_a_kill_before_the_summary_costs_nothing(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "samples")
    finish(start(corpus, workdir))
    found, expected = (json.loads((path / "summary.json").read_text()) for path in (workdir, uninterrupted))
    assert found == expected


def test_an_update_that_is_not_finite_is_left_out_and_the_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    finish(start(corpus, tmp_path / "run", LMJAX_FAULTS="nan_grad@step:20"))
    skipped = [line["step"] for line in deterministic_lines(tmp_path / "run") if line.get("optim/skipped")]
    assert skipped == [20]


def test_too_many_updates_that_are_not_finite_end_the_run(corpus: Path, tmp_path: Path) -> None:
    faults = ",".join(f"nan_grad@step:{step}" for step in range(20, 23))
    output = finish(
        start(corpus, tmp_path / "run", "--config.train.max_skipped_in_a_row=2", LMJAX_FAULTS=faults), code=5
    )
    assert "lmjax: error: step 22: the loss or its gradient was not finite 3 steps in a row" in output
    assert steps.verify(tmp_path / "run") == []


def test_a_finished_run_is_left_alone(corpus: Path, uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    assert "is finished" in finish(start(corpus, uninterrupted))
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_the_same_command_twice_at_once_is_one_run(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    both = [start(corpus, tmp_path / "run") for _ in range(2)]
    outputs = sorted((finish(process) for process in both), key=len)
    assert "is finished after 60 steps" in outputs[0]
    assert_same_run(tmp_path / "run", uninterrupted)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"event": "start"' in line for line in lines) == 1


def test_a_second_run_does_not_wait_forever(tmp_path: Path) -> None:
    held = (
        "import sys; from etils import epath; from lmjax.run.workdir import lock\nwith lock(epath.Path(sys.argv[1])):"
    )
    first = subprocess.Popen([sys.executable, "-c", held + " print(flush=True); input()", tmp_path], **PIPES)
    assert first.stdout and first.stdout.readline() == "\n"
    with pytest.raises(StallError, match="another process trains in"), lock(epath.Path(tmp_path), patience=0.1):
        pass
    first.kill()
    first.wait()
    with lock(epath.Path(tmp_path), patience=5.0):
        pass


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        (["train.steps=70", "model.mlp=48"], "model.mlp was 64, now 48"),
        (["train.steps=50"], "train.steps was 60, now 50"),
        (["model.attention_softcap=5.0"], "model.attention_softcap was None, now 5.0"),  # model.attention may change
    ],
)
def test_another_config_in_the_same_workdir_is_refused(
    corpus: Path, uninterrupted: Path, settings: list[str], changed: str
) -> None:
    output = finish(start(corpus, uninterrupted, *(f"--config.{setting}" for setting in settings)), code=2)
    assert changed in output and "--allow-config-change" in output
