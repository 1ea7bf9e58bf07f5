"""Branches are the runs that their configs say, to the bit, whatever happens to them or to their trunk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmjax import config
from lmjax.errors import DONE, PREEMPTED, CheckpointError, ConfigError
from lmjax.process import faults
from lmjax.record import inspect, seal
from lmjax.record.tracking import read_jsonl
from lmjax.run import branch, dry_run, run, workdir

pytestmark = pytest.mark.usefixtures("quick_compilation", "compiled_once")

CONFIG = Path(__file__).parents[1] / "tiny_config.py"
SETTINGS = (
    "train.sample.prompts=()",
    "train.evaluate_every=4",
    "checkpoint.every=4",
    "checkpoint.keep_every=4",
    "model.layers=1",
    "optimizer.schedule.warmup=3",
)
TRUNK = ("optimizer.schedule.name=constant", "train.steps=16")
DECAYED = ("optimizer.schedule.name=wsd", "optimizer.schedule.decay_fraction=0.3", "train.steps=12")
"""At its peak until update 8.4."""


@pytest.fixture(scope="module")
def place(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has a trunk, and the branch's config trained from the start."""
    place = tmp_path_factory.mktemp("branches")
    for name, own in {"trunk": TRUNK, "alone": DECAYED}.items():
        assert run.run(load(corpus, *own), place / name, run.Options()) == DONE
    return place


def load(corpus: Path, *settings: str) -> config.Config:
    return config.load(f"{CONFIG}:{corpus}", [*SETTINGS, *settings])


def final(place: Path) -> tuple[Any, ...]:
    """All that a finished run is, but for the time that it took."""
    rows = [
        {key: value for key, value in row.items() if not key.startswith(("time", "perf/"))}
        for row in read_jsonl(place / "metrics.jsonl")
    ]
    hashes = inspect.inspect(place, hashes=True)["hashes"]
    return rows, json.loads((place / "summary.json").read_text()), hashes, workdir.verify(place)


@pytest.mark.parametrize("step", [4, 8])
def test_a_branch_is_the_run_that_its_config_says(corpus: Path, place: Path, tmp_path: Path, step: int) -> None:
    cfg = load(corpus, *DECAYED, f"train.branch_from={place / 'trunk'}@{step}")
    assert run.run(cfg, tmp_path / "branch", run.Options()) == DONE
    assert final(tmp_path / "branch") == final(place / "alone")


def test_what_comes_between_changes_nothing(
    corpus: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk while the past is copied, a stop after it; by then the trunk may be gone."""
    shutil.copytree(place / "trunk", tmp_path / "trunk")
    cfg = load(corpus, *DECAYED, f"train.branch_from={tmp_path / 'trunk'}@4")
    with monkeypatch.context() as patch:
        patch.setattr(seal, "write_atomically", full_disk)
        with pytest.raises(CheckpointError, match=r"storage: cannot write .*No space left"):
            run.run(cfg, tmp_path / "branch", run.Options())
    with monkeypatch.context() as patch:
        patch.setenv("LMJAX_FAULTS", "terminate@step:6")
        patch.setattr(faults, "_calls", {})
        assert run.run(cfg, tmp_path / "branch", run.Options()) == PREEMPTED
    shutil.rmtree(tmp_path / "trunk")
    assert run.run(cfg, tmp_path / "branch", run.Options()) == DONE
    assert final(tmp_path / "branch") == final(place / "alone")


def full_disk(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_branch_may_be_the_trunk_of_another(corpus: Path, place: Path, tmp_path: Path) -> None:
    longer = [*DECAYED[:2], "train.steps=16"]
    first = load(corpus, *longer, f"train.branch_from={place / 'trunk'}@4")
    assert run.run(first, tmp_path / "first", run.Options()) == DONE
    second = load(corpus, *DECAYED, f"train.branch_from={tmp_path / 'first'}@8")
    assert run.run(second, tmp_path / "second", run.Options()) == DONE
    assert final(tmp_path / "second") == final(place / "alone")


def test_a_damaged_trunk_is_told(corpus: Path, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "trunk", tmp_path / "trunk")
    step = tmp_path / "trunk" / "checkpoints" / "4"
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes([largest.read_bytes()[0] ^ 1]) + largest.read_bytes()[1:])
    cfg = load(corpus, *DECAYED, f"train.branch_from={tmp_path / 'trunk'}@4")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"checkpoints/4 is damaged: .* has other contents"):
            run.run(cfg, tmp_path / "branch", run.Options())


@pytest.mark.parametrize(
    ("at", "settings", "problem"),
    [
        ("", (), "say at which step, .*trunk@STEP"),
        ("@20", ("train.steps=40",), r"no sealed checkpoint of step 20 \(sealed steps: 4, 8, 12, 16\)"),
        ("@12", (), "is not before the end, train.steps=12"),
        (
            "@8",
            ("optimizer.schedule.decay_fraction=0.5",),
            "update 7 has the learning rate .* at step 7 at most",
        ),
        ("@4", ("optimizer.learning_rate=0.005",), "optimizer.learning_rate is .* there and 0.005 here"),
        ("@4", ("model.embed=16",), "model.embed is 32 there and 16 here"),
        ("@4", ("train.seed=1",), "train.seed is 0 there and 1 here"),
        ("x@4", (), "trunkx is not the work directory of a run"),
        ("@4", ("optimizer.schedule.warmup=4",), "update 0 has the learning rate"),
    ],
)
def test_what_is_no_branch_is_named(
    corpus: Path, place: Path, at: str, settings: tuple[str, ...], problem: str
) -> None:
    cfg = load(corpus, *DECAYED, f"train.branch_from={place / 'trunk'}{at}", *settings)
    with pytest.raises(ConfigError, match=rf"train\.branch_from=.*{problem}"):
        branch.check(cfg)
    with pytest.raises(ConfigError, match=problem):
        list(dry_run.describe(cfg))
