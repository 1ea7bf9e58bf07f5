"""Runs that train together are, in all that they leave behind, the runs that they would have been alone."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath

from lmjax import cells, config
from lmjax.__main__ import parse, split_runs
from lmjax.commands import train_together
from lmjax.config import Config
from lmjax.errors import DONE, PREEMPTED, ConfigError, NumericalError
from lmjax.process import faults as fault_hooks
from lmjax.record import inspect
from lmjax.record.tracking import read_events, read_jsonl
from lmjax.run import run, stack, workdir
from lmjax.run.stack import Member, SideBySide, Stacked

pytestmark = pytest.mark.usefixtures("quick_compilation", "compiled_once", "compile_cache")

CONFIG = Path(__file__).parents[1] / "tiny_config.py"
SETTINGS = (
    "train.steps=12",
    "train.sample.prompts=()",
    "train.evaluate_every=6",
    "checkpoint.every=4",
    "model.layers=1",
    "model.dropout=0",
    "train.microbatches=1",
)
SCALARS = (
    ("train.seed=0", "optimizer.learning_rate=1e-3"),
    ("train.seed=1", "optimizer.learning_rate=3e-3", "optimizer.b2=0.99"),
    ("train.seed=2", "train.steps=9", "optimizer.clip_norm=None", "data.sources.a.weight=1.0"),
)
TWO = SCALARS[:2]
DROPPING = tuple((*one, f"model.dropout={rate}") for one, rate in zip(SCALARS, (0.1, 0.2, 0.1), strict=True))
DIVERGES = ("train.seed=3", "optimizer.learning_rate=1e30", "train.max_skipped_in_a_row=2")

Load = Callable[..., Config]
Alone = Callable[[tuple[str, ...]], Path]


@pytest.fixture(scope="module")
def load(corpus: Path) -> Load:
    return lambda *settings: config.load(f"{CONFIG}:{corpus}", [*SETTINGS, *settings])


def together(
    directory: Path, cfgs: Sequence[Config], share: Any = SideBySide, faults: str = "", monkeypatch: Any = None
) -> int:
    if monkeypatch is not None:
        monkeypatch.setenv("LMJAX_FAULTS", faults)
        monkeypatch.setattr(fault_hooks, "_calls", {})
    members = [Member(cfg, epath.Path(directory / str(i)), run.Options()) for i, cfg in enumerate(cfgs)]
    return stack.train(members, share)


@pytest.fixture(scope="module")
def alone(load: Load, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Where a run of these settings is, trained by itself."""

    @functools.cache
    def directory(settings: tuple[str, ...]) -> Path:
        path = tmp_path_factory.mktemp("alone")
        assert run.run(load(*settings), path, run.Options()) == DONE
        return path

    return directory


def left_behind(directory: Path) -> dict[str, Any]:
    """All that a run's directory says, without clocks and its own name."""
    lines = [
        {key: value for key, value in row.items() if key != "time" and not key.startswith("perf/")}
        for row in read_jsonl(directory / "metrics.jsonl")
    ]
    names = {path.name for place in ("", "checkpoints", "samples") for path in (directory / place).glob("*")}
    summary = json.loads((directory / "summary.json").read_text())
    return {
        "hashes": inspect.inspect(directory, hashes=True)["hashes"],
        "lines": lines,
        "ledger": workdir.verify(directory),
        "names": names,
        "config": (directory / "config.json").read_text(),
        "summary": {key: value for key, value in summary.items() if not key.startswith("perf/")},
    }


@pytest.mark.slow
def test_side_by_side_each_ends_as_it_would_alone(
    load: Load, alone: Alone, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    """To the bit; with an error in between, after which one goes on alone and the others together."""
    cfgs = [load(*settings) for settings in DROPPING]
    assert together(tmp_path, cfgs, faults="raise@step:7", monkeypatch=monkeypatch) == 1
    said = capfd.readouterr().err
    assert all(f"[{i}] lmjax: error: RuntimeError: injected" in said for i in range(3))
    monkeypatch.setenv("LMJAX_FAULTS", "")
    assert run.run(cfgs[0], tmp_path / "0", run.Options()) == DONE
    assert together(tmp_path, cfgs) == DONE
    for i, settings in enumerate(DROPPING):
        assert left_behind(tmp_path / str(i)) == left_behind(alone(settings))


def test_one_that_diverges_does_not_touch_the_others(load: Load, alone: Alone, tmp_path: Path, capfd: Any) -> None:
    cfgs = [load(*settings) for settings in (SCALARS[0], DIVERGES, SCALARS[1])]
    assert together(tmp_path, cfgs) == NumericalError.exit_code
    err = capfd.readouterr().err
    assert "[1] lmjax: error: step 4: the loss or its gradient was not finite 3 steps in a row" in err
    assert all(f"[{i}] lmjax: exit code {code}\n" in err for i, code in ((0, 0), (1, 5), (2, 0)))
    assert [left_behind(tmp_path / str(i)) for i in (0, 2)] == [left_behind(alone(one)) for one in TWO]
    assert read_events(tmp_path / "1" / "metrics.jsonl")[-1]["status"] == "diverged"


def test_a_signal_has_all_of_them_save(load: Load, alone: Alone, tmp_path: Path, monkeypatch: Any) -> None:
    """Even one that has taken no step yet. One goes on alone, the other in a stack."""
    cfgs = [load(*settings) for settings in TWO]
    assert together(tmp_path, cfgs, faults="terminate@step:7", monkeypatch=monkeypatch) == PREEMPTED
    for i in range(2):
        assert read_events(tmp_path / str(i) / "metrics.jsonl")[-1]["status"] == "preempted"
    monkeypatch.setenv("LMJAX_FAULTS", "")
    assert run.run(cfgs[0], tmp_path / "0", run.Options()) == DONE
    assert together(tmp_path, cfgs) == DONE
    assert [left_behind(tmp_path / str(i)) for i in range(2)] == [left_behind(alone(one)) for one in TWO]


@pytest.mark.parametrize(
    "settings", [TWO, pytest.param((*DROPPING, (*DIVERGES, "model.dropout=0.1")), marks=pytest.mark.slow)]
)
def test_stacked_each_step_is_the_one_alone_to_rounding(
    load: Load, alone: Alone, tmp_path: Path, settings: Sequence[tuple[str, ...]]
) -> None:
    """By vmap; of four, runs of different length leave one after another, and one diverges."""
    code = NumericalError.exit_code if len(settings) > len(SCALARS) else DONE
    assert together(tmp_path, [load(*one) for one in settings], Stacked) == code
    for i, one in enumerate(settings[: len(SCALARS)]):
        found, expected = (read_jsonl(place / "metrics.jsonl") for place in (tmp_path / str(i), alone(one)))
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        for row, other in zip(found, expected, strict=True):
            losses = [key for key in other if key.endswith("/loss")]
            assert [row[key] for key in losses] == pytest.approx([other[key] for key in losses], rel=1e-5)
        assert workdir.verify(tmp_path / str(i)) == []


def test_an_error_of_the_step_is_every_runs(load: Load, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    def no_memory(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr("lmjax.run.assemble.stacked_step", lambda experiment: no_memory)
    assert together(tmp_path, [load(*settings) for settings in TWO], Stacked) == ConfigError.exit_code
    assert capfd.readouterr().err.count("more memory than there is; lower the number of runs") == 2


# What may train together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("model.mlp=48",), "model.mlp is 48 here, but 64 in the first run of the stack"),
        (("optimizer.name=lion",), "optimizer.name is 'lion' here, but 'adamw'"),
        (("model.dropout=0.1",), "model.dropout is 0.1 here, but 0.0"),
        (("train.batch=16",), "train.batch is 16 here, but 8"),
        (("data.documents=separate",), "data.documents is 'separate' here, but 'joined'"),
        (("optimizer.schedule.name=wsd",), "optimizer.schedule.name is 'wsd' here, but 'cosine'"),
        (("train.microbatches=4",), "train.microbatches is 4 here, but 2"),
        (("train.noise_scale=True",), "train.noise_scale is True here, but False"),
        (("train.loss.z_weight=1e-4",), "train.loss.z_weight is 0.0001 here, but 0.0"),
    ],
)
def test_other_shapes_are_refused_before_anything_starts(
    load: Load, tmp_path: Path, settings: tuple[str, ...], named: str
) -> None:
    two = "train.microbatches=2"
    with pytest.raises(ConfigError, match=named):
        together(tmp_path, [load(two), load(two, *settings)])
    assert not any(tmp_path.iterdir())
    assert cells.program(load(two)) != cells.program(load(two, *settings))


def test_one_work_directory_is_for_one_run(load: Load, tmp_path: Path) -> None:
    members = [Member(load(), epath.Path(tmp_path / name), run.Options()) for name in ("a", "b/../a")]
    with pytest.raises(ConfigError, match="is that of 2 runs"):
        stack.train(members)


# The command ----------------------------------------------------------------------------------------------------------


def test_what_stands_before_the_first_separator_is_every_runs() -> None:
    words = ["train", "--config=c.py", "--", "--workdir=a", "--", "--workdir=b", "--config.train.seed=1"]
    assert split_runs(words) == [[*words[:2], "--workdir=a"], [*words[:2], "--workdir=b", "--config.train.seed=1"]]
    assert split_runs(["inspect", "x"]) == [["inspect", "x"]] and split_runs([]) == [[]]
    with pytest.raises(ConfigError, match="lmjax evaluate takes none"):
        split_runs(["evaluate", "--", "x"])


@pytest.mark.parametrize("flag", ["--dry-run", "--profile=2:3", "--processes=2"])
def test_what_is_of_one_run_alone_is_refused(flag: str) -> None:
    words = ["train", "--config=c.py", flag, "--", "--workdir=a", "--", "--workdir=b"]
    with pytest.raises(ConfigError, match=flag.partition("=")[0]):
        train_together([parse(one) for one in split_runs(words)])


@pytest.mark.slow
def test_two_hundred_steps_with_kills_in_between(corpus: Path, tmp_path: Path) -> None:
    """The command, killed twice with SIGKILL, against each run alone in a process of its own."""
    common = [f"--config={CONFIG}:{corpus}", "--config.train.steps=200", "--config.checkpoint.every=20"]
    own = [["--config.train.seed=0"], ["--config.train.seed=1", "--config.optimizer.learning_rate=4e-3"]]
    command = [sys.executable, "-m", "lmjax", "train", *common]
    for i, settings in enumerate(own):
        subprocess.run([*command, *settings, f"--workdir={tmp_path}/alone{i}"], check=True, capture_output=True)
    stacked = [*command]
    for i, settings in enumerate(own):
        stacked += ["--", *settings, f"--workdir={tmp_path}/{i}"]
    for step in (50, 130):
        process = subprocess.Popen(stacked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ledger = tmp_path / "1" / "ledger.jsonl"
        while not (ledger.exists() and f'"step": {step},' in ledger.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(stacked, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    for i in range(2):
        assert left_behind(tmp_path / str(i)) == left_behind(tmp_path / f"alone{i}")


@pytest.mark.slow
def test_on_eight_devices(on_eight_devices: Callable[..., None]) -> None:
    on_eight_devices(Path(__file__).parent / "stack_devices.py")
