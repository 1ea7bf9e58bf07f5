"""The README's first command, in a short form: the same corpus, tokenizer and model, fewer steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHORT = ["--config.train.steps=60", "--config.optimizer.schedule.warmup=5", "--config.train.evaluate_every=30"]


def test_the_quickstart_trains_evaluates_samples_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user's machine runs it: without the XLA flags of the tests."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    config, workdir = ROOT / "configs" / "quickstart.py", tmp_path / "run"
    command = [sys.executable, "-m", "lmjax", "train", f"--config={config}", f"--workdir={workdir}", *SHORT]
    output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "is finished" in again

    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["val/stdlib/loss"] < 5.5  # log(4096) = 8.3 before training
    assert 1.1 < summary["val_full/stdlib/xz_primed_bpb"] < summary["val_full/stdlib/xz_bpb"] < 1.9
    assert (workdir / "loss.png").stat().st_size > 10_000
    assert "bits per byte" in (workdir / "report.md").read_text()
    sample = (workdir / "samples" / "60.txt").read_text()
    assert sample.startswith("def") and sample.strip() in output


def test_a_folder_of_text_is_one_command_away_from_a_model(tmp_path: Path) -> None:
    """One short text in another script: too few documents to draw from, too little for learned pieces."""
    (tmp_path / "my text").mkdir()
    (tmp_path / "my text" / "poem.txt").write_text("بشنو این نی چون شکایت می‌کند از جدایی‌ها حکایت می‌کند\n" * 200)
    config, workdir = ROOT / "configs" / "own_text.py", tmp_path / "run"
    small = ["--config.model.layers=1", "--config.train.steps=2", "--config.optimizer.schedule.warmup=1"]
    command = [sys.executable, "-m", "lmjax", "train", f"--config={config}:my text", f"--workdir={workdir}", *small]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "too few documents to draw some for validation" in done.stderr
    assert (tmp_path / "data" / "my-text" / "manifest.json").exists()
    assert json.loads((workdir / "summary.json").read_text())["val/own/loss"] > 0
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "is finished" in again.stdout
