"""The README's first command, in a short form: the same corpus, tokenizer and model, fewer steps."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHORT = ["--config.train.steps=60", "--config.optimizer.schedule.warmup=5", "--config.train.evaluate_every=30"]


def test_the_quickstart_trains_evaluates_samples_and_reports(tmp_path: Path) -> None:
    config, workdir = ROOT / "configs" / "quickstart.py", tmp_path / "run"
    command = [sys.executable, "-m", "lmjax", "train", f"--config={config}", f"--workdir={workdir}", *SHORT]
    output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "is finished" in again

    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["val/stdlib/loss"] < 5.5  # log(2048) = 7.6 before training
    assert 1.1 < summary["val/stdlib/xz_primed_bpb"] < summary["val/stdlib/xz_bpb"] < 1.9
    assert (workdir / "loss.png").stat().st_size > 10_000
    assert "bits per byte" in (workdir / "report.md").read_text()
    sample = (workdir / "samples" / "60.txt").read_text()
    assert sample.startswith("def") and sample.strip() in output
