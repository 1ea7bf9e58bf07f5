"""A run knows the weights that it began with, wherever they lie now."""

import dataclasses
import json
import shutil
from pathlib import Path

from etils import epath

from lmjax.config import Config
from lmjax.record import seal
from lmjax.run import origin
from lmjax.tasks.start import digest
from lmjax.train.config import TrainConfig


def starting_from(init_from: str) -> Config:
    return dataclasses.replace(Config(), train=TrainConfig(init_from=init_from))


def seal_step(run: Path, step: int) -> None:
    """A checkpoint, as far as its seal."""
    (run / "checkpoints" / str(step)).mkdir(parents=True)
    document = {"step": step, "time": 0.0, "value": None, "meta": {}, "leaves": {}}
    seal.write(epath.Path(run / "checkpoints" / str(step)), document, {"state": ["ab", step]})


def test_a_start_that_was_moved_and_trained_on_needs_no_step(tmp_path: Path) -> None:
    seal_step(tmp_path / "base", 6)
    saved, mine = starting_from(f"{tmp_path}/base@6"), epath.Path(tmp_path / "mine")
    mine.mkdir()
    (mine / "metrics.jsonl").write_text(json.dumps({"event": "start", "start": digest(f"{tmp_path}/base")}) + "\n")
    for step in (8, 10):
        seal_step(tmp_path / "base", step)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    shutil.rmtree(tmp_path / "other/checkpoints/6")
    (tmp_path / "other/checkpoints/8").rename(tmp_path / "other/checkpoints/6")

    def found(init_from: str) -> tuple[str | None, bool]:
        """What is taken to be meant, and whether it is what the run began with."""
        cfg = origin.with_pinned_origins(starting_from(init_from), saved, mine)
        return cfg.train.init_from, origin.is_same_start(mine, cfg)

    assert found(f"{tmp_path}/moved") == (f"{tmp_path}/moved@6", True)
    assert found(f"{tmp_path}/moved@6") == (f"{tmp_path}/moved@6", True)
    assert found(f"{tmp_path}/moved@8") == (f"{tmp_path}/moved@8", False)
    assert found(f"{tmp_path}/other") == (f"{tmp_path}/other", False)  # which has another step 6
    assert found(f"{tmp_path}/base")[0] == f"{tmp_path}/base@6"
