"""A sweep that grows, with a simulated surface in the trainer's place."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.simulate import EPOCH
from launch import manifest, status
from launch.__main__ import main
from launch.engines import ENGINES
from launch.job import Hardware, Job
from lmjax.config import load
from lmjax.errors import DONE, PREEMPTED, ConfigError

NOISE_SD = 0.003
CONFIG = """
from lmjax.config import as_config_dict, default_config
from lmjax.data.config import PrepareConfig, SourceConfig, TokenizerConfig

def get_config():
    config = default_config()
    recipe = PrepareConfig(inputs=({corpus!r},), tokenizer=TokenizerConfig(kind="bytes"), valid_fraction=0.2)
    config.data.sources = {{"text": as_config_dict(SourceConfig(path={prepared!r}, prepare=recipe))}}
    config.data.seq_len, config.train.batch = 32, 8
    return config
"""


class Simulated:
    """An engine whose cells end at once, with losses from a surface and noise of their own; `broken` cells do not."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.broken: dict[int, int] = {}
        """Exit code by cell."""
        self.off = 0.0
        """What cells that were forecast lie above the surface, nats."""

    def add_arguments(self, parser: Any) -> None:
        pass

    def render(self, *_: Any) -> dict[str, str]:
        return {}

    def submit(self, name: str, directory: str, jobs: Sequence[Job], hardware: Hardware, arguments: Namespace) -> int:
        sweep, root = manifest.read(directory), Path(directory)
        for job in jobs:
            entry = sweep.cells[job.index]
            self.started.append(job.index)
            (root / entry.attempts).parent.mkdir(exist_ok=True)
            if job.index in self.broken:
                ended = {"event": "ended", "time": 2.0, "code": self.broken.pop(job.index), "last": "x"}
                start = {"event": "started", "time": 1.0, "host": "h", "pid": 1}
                (root / entry.attempts).write_text(json.dumps(start) + "\n" + json.dumps(ended) + "\n")
                continue
            noise = np.random.default_rng(job.index).normal(0, NOISE_SD)
            loss = float(EPOCH.loss(entry.params_active, entry.tokens)) + noise
            loss += self.off * (root / "forecasts" / f"{job.index:04d}.json").exists()
            (root / entry.workdir).mkdir(parents=True)
            (root / entry.workdir / "summary.json").write_text(
                json.dumps({"step": entry.steps, "val_full/text/loss": loss})
            )
        return DONE

    def stop(self, *_: Any) -> int:
        return DONE


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    simulated = Simulated()
    monkeypatch.setitem(ENGINES, "simulated", simulated)
    return simulated


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "corpus").mkdir()
    for number in range(8):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"text {number} " * 400)
    path = tmp_path / "family.py"
    path.write_text(CONFIG.format(corpus=f"{tmp_path}/corpus", prepared=f"{tmp_path}/prepared"))
    return str(path)


def grow(out: Path, config: str, *flags: str) -> int:
    goal = ["--target=1e22", "--tolerance=0.4", "--smallest=1e7", "--largest=1e10", "--budget=3e21"]
    return main(["grow", str(out), f"--config={config}", "--engine=simulated", *goal, *flags])


def test_it_grows_until_it_knows(
    engine: Simulated, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    assert grow(out, config, "--until-done") == DONE
    told = capsys.readouterr().out
    sweep = manifest.read(out)
    assert "stop: half the interval of ln N* is" in told and "inside their intervals" in told
    assert "warning: so few forecasts hold" not in told
    assert sum(entry.flops_6nd for entry in sweep.cells) < 3e21
    rounds = [entry.round for entry in sweep.cells]
    assert rounds == sorted(rounds) and rounds[-1] >= 1
    assert engine.started == [entry.index for entry in sweep.cells]  # each once
    assert all(entry.name for entry in sweep.cells)  # also where a round has but one
    made = sorted(int(path.stem) for path in (out / "forecasts").iterdir())
    assert made and made == [entry.index for entry in sweep.cells if entry.round >= sweep.cells[made[0]].round]

    again = len(engine.started)
    assert grow(out, config) == DONE and len(engine.started) == again

    assert main(["recommend", str(out), "--target=1e22", "--smallest=1e7", "--largest=1e11"]) == DONE
    cfg = load(str(out / "recommended.py"))
    tokens = cfg.train.steps * cfg.train.batch * cfg.data.seq_len
    params = 12 * cfg.model.layers * cfg.model.embed**2
    best = EPOCH.optimum(1e22)
    assert abs(np.log(params / best[0])) < 0.5 and 6 * params * tokens == pytest.approx(1e22, rel=0.3)
    assert "prediction interval" in (out / "recommended.py").read_text()


def test_a_step_at_a_time_is_the_same_sweep(engine: Simulated, config: str, tmp_path: Path) -> None:
    """A cron line and a process that waits come to the same cells."""
    whole, steps = tmp_path / "whole", tmp_path / "steps"
    assert grow(whole, config, "--until-done") == DONE
    codes = []
    while not codes or codes[-1] == PREEMPTED:
        codes.append(grow(steps, config))
    assert codes[-1] == DONE and len(codes) > 3
    assert [entry.digest for entry in manifest.read(steps).cells] == [
        entry.digest for entry in manifest.read(whole).cells
    ]


def test_what_did_not_finish_is_started_again_and_what_diverged_is_not(
    engine: Simulated, config: str, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    engine.broken = {1: 137, 2: 5, 3: 4}
    assert grow(out, config) == PREEMPTED
    assert [row.state for row in status.rows(out)][:4] == ["done", "killed", "failed", "failed"]
    begun = len(engine.started)
    assert grow(out, config) == PREEMPTED
    assert engine.started[begun:] == [1, 3]
    assert grow(out, config, "--until-done") == DONE
    assert engine.started.count(2) == 1


def test_short_cells_are_neither_trained_nor_counted(
    engine: Simulated, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They tell of their warmup."""
    bounded, free = tmp_path / "bounded", tmp_path / "free"
    assert grow(free, config, "--fewest-steps=1") == PREEMPTED
    steps = sorted(entry.steps for entry in manifest.read(free).cells)
    fewest = steps[len(steps) // 2]
    short = sum(one < fewest for one in steps)
    assert grow(bounded, config, f"--fewest-steps={fewest}") == PREEMPTED
    assert short and min(entry.steps for entry in manifest.read(bounded).cells) >= fewest
    capsys.readouterr()
    assert grow(free, config, f"--fewest-steps={fewest}") == PREEMPTED
    assert f"left out, of too few updates (--fewest-steps): {short} cells" in capsys.readouterr().out


def test_forecasts_that_fail_are_a_warning(
    engine: Simulated, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.off = 1.0
    assert grow(tmp_path / "sweep", config, "--until-done", "--budget=2e20") == DONE
    assert "warning: so few forecasts hold" in capsys.readouterr().out


def test_it_ends_when_the_money_does(
    engine: Simulated, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grow(tmp_path / "sweep", config, "--budget=1e17", "--tolerance=0.01", "--until-done") == DONE
    assert "FLOPs are left" in capsys.readouterr().out
    spent = sum(entry.flops_6nd for entry in manifest.read(tmp_path / "sweep").cells)
    assert spent <= 1e17


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--tolerance=0"], "tolerance"),
        (["--level=1.5"], "level"),
        (["--smallest=1e3", "--largest=1e4"], "no shape has 1e\\+03 to 1e\\+04 parameters"),
        (["--ratios=5,2"], "--ratios"),
        (["--ratios=0,2"], "--ratios"),
    ],
)
def test_mistakes_are_named(engine: Simulated, config: str, tmp_path: Path, flags: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        grow(tmp_path / "sweep", config, *flags)
    assert not engine.started


def test_a_forecast_that_was_edited_is_refused(engine: Simulated, config: str, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    while not (out / "forecasts").exists() or not any((out / "forecasts").iterdir()):
        assert grow(out, config) == PREEMPTED
    path = next((out / "forecasts").iterdir())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loss": 1.0}))
    with pytest.raises(ValueError, match="edited after"):
        grow(out, config)


def test_a_sweep_that_begins_needs_a_config(engine: Simulated, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name the models to train"):
        main(["grow", str(tmp_path / "new"), "--target=1e22", "--budget=1e20"])
    with pytest.raises(ConfigError, match="not a readable sweep"):
        main(["recommend", str(tmp_path / "new"), "--target=1e22"])
