"""Work directories: ours, or somebody else's; whole, or not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from lmjax import config
from lmjax.config import Config
from lmjax.errors import CheckpointError, ConfigError
from lmjax.record.checkpoint import Checkpoints
from lmjax.record.config import CheckpointConfig
from lmjax.record.ledger import Ledger
from lmjax.record.steps import SEALED
from lmjax.run import convert, workdir


def trained(directory: Path, steps: int) -> Path:
    """What a run of batches of 4 leaves behind, as far as `verify` looks."""
    import jax.numpy as jnp

    ledger = Ledger(directory / "ledger.jsonl")
    checkpoints = Checkpoints(directory / "checkpoints", CheckpointConfig(keep_last=3))
    for step in range(1, steps + 1):
        ledger.record(0, step, 4 * (step - 1), 4, step)
        ledger.sync()
        checkpoints.save(step, {"w": jnp.ones(3)}, {"data": {"next_sample": 4 * step}})
    checkpoints.wait()
    ledger.close()
    return directory


# Whose it is ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["report.md", "summary.json", "config.json", "tokenizer/words", "samples/a.wav", "checkpoints/100/model.pt"]
)
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match=f"has a {name.split('/')[0]} of its own"):
        workdir.locate(tmp_path)
    with pytest.raises((ConfigError, CheckpointError)):
        convert.new_workdir(str(tmp_path))
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]


def test_a_new_folder_and_a_run_are_ours(tmp_path: Path) -> None:
    workdir.locate(tmp_path / "new")
    (tmp_path / "log.txt").write_text("of a scheduler")
    workdir.locate(tmp_path)
    (tmp_path / "config.json").write_text(config.to_json(Config()))
    (tmp_path / "report.md").write_text("")
    workdir.locate(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / SEALED).write_text("")
    workdir.locate(tmp_path)


def test_a_bucket_without_its_package_is_named(monkeypatch: Any) -> None:
    def missing(self: Any) -> bool:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", missing)
    with pytest.raises(ConfigError, match=r"--workdir=gs://bucket/run: .*gcsfs"):
        workdir.locate("gs://bucket/run")


# Whether it is whole --------------------------------------------------------------------------------------------------


def test_a_ledger_that_is_missing_or_cut_is_noticed(tmp_path: Path) -> None:
    ledger = trained(tmp_path, 4) / "ledger.jsonl"
    assert workdir.verify(epath.Path(tmp_path)) == []
    lines = ledger.read_text().splitlines(keepends=True)
    for kept in ("", "".join(lines[:2]), "".join(lines[:3]) + lines[3][:20], "".join(lines[1:])):
        ledger.write_text(kept)
        assert workdir.verify(epath.Path(tmp_path)), kept
    ledger.unlink()
    assert workdir.verify(epath.Path(tmp_path)) == [
        "ledger.jsonl is missing, though 3 checkpoints of training are sealed"
    ]


@pytest.mark.parametrize(
    "line", ['{"a": 1}', '{"attempt": "0", "step": null, "first_sample": 8, "count": 4, "crc": 3}']
)
def test_a_line_that_is_not_a_ledgers_is_left_out(tmp_path: Path, line: str, caplog: Any) -> None:
    ledger = trained(tmp_path, 3) / "ledger.jsonl"
    lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join([*lines, line, ""]))
    assert workdir.verify(epath.Path(tmp_path)) == [] and workdir.next_attempt(epath.Path(tmp_path)) == 1
    assert "lines that are not a ledger's are left out: 1" in caplog.text
    ledger.write_text("\n".join([*lines[:2], line, ""]))
    assert workdir.verify(epath.Path(tmp_path)) == ["the ledger does not have step 3, whose checkpoint is sealed"]


@pytest.mark.parametrize("text", ['{"st', "[1]", '{"step": Infinity}', '{"step": "last"}', "{}", "[" * 100_000])
def test_a_summary_that_is_damaged_counts_for_nothing(tmp_path: Path, text: str, caplog: Any) -> None:
    (trained(tmp_path, 1) / "summary.json").write_text(text)
    config.write_json(epath.Path(tmp_path / "config.json"), Config())
    assert workdir.finished_step(epath.Path(tmp_path), hash_files=True) is None
    assert "summary.json is damaged" in caplog.text


def test_a_step_that_a_kill_left_unsealed_counts_for_nothing(tmp_path: Path) -> None:
    trained(tmp_path, 3)
    shutil.copytree(tmp_path / "checkpoints" / "3", tmp_path / "checkpoints" / "4")
    next((tmp_path / "checkpoints" / "4").glob("LMJAX_MANIFEST*")).unlink()
    assert workdir.verify(epath.Path(tmp_path)) == []


# Which run of wandb it is ---------------------------------------------------------------------------------------------


def test_the_wandb_run_stays_the_same_whatever_changes(tmp_path: Path) -> None:
    settings = [config.parse({"train": {"log_every": every}}) for every in (1, 2)]
    first = workdir.run_id(epath.Path(tmp_path), settings[0])
    assert workdir.run_id(epath.Path(tmp_path), settings[1]) == first
    (tmp_path / "other").mkdir()
    assert workdir.run_id(epath.Path(tmp_path / "other"), settings[0]) != first


def test_an_older_directory_rejoins_its_wandb_run(tmp_path: Path) -> None:
    before = config.parse({"train": {"log_every": 3}})
    (tmp_path / "config.json").write_text(config.to_json(before))
    expected = config.hash_text(json.dumps(json.loads(config.to_json(before)), indent=1), str(tmp_path))
    assert workdir.run_id(epath.Path(tmp_path), Config()) == expected
