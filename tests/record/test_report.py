"""A report is made from the files of a work directory alone."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lmjax.record.history import read_record
from lmjax.record.loss_plot import plot_loss
from lmjax.record.report import time_spent, write_report

CONFIG = {"train": {"steps": 400, "batch": 8}, "data": {"seq_len": 128}, "model": {"layers": 2}}


class Clock:
    """Writes a metrics.jsonl as a run would, at times of its own."""

    def __init__(self, workdir: Path) -> None:
        self.path, self.now = workdir / "metrics.jsonl", 1_000_000.0

    def write(self, **record: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"time": self.now, **record}) + "\n")

    def start(self, step: int) -> None:
        environment = {"jax": "0.10.2", "device_kind": "cpu", "git_commit": "abc"}
        params = {"total": 1000, "non_embedding": 600, "matmul": 900}
        command = "lmjax train --config=configs/x.py"
        self.write(event="start", step=step, steps=400, command=command, environment=environment, params=params)

    def steps(self, first: int, last: int, **more: Any) -> None:
        """Log every 10 steps of 0.5 s; the first ten of an attempt compile for 20 s and have no rate."""
        for step in range(first + 10, last + 1, 10):
            self.now += 20.0 if step == first + 10 else 5.0
            rate = {} if step == first + 10 else {"perf/step_time": 0.5, "perf/tokens_per_sec": 2048.0, **more}
            loss = 1.5 + 6 * math.exp(-step / 60) + 0.15 * math.sin(step * 1.7)
            self.write(step=step, tokens=1024 * step, flops=10**6 * step, **{"train/loss": loss}, **rate)

    def evaluate(self, step: int, loss: float) -> None:
        self.now += 10.0
        values = {"val/main/loss": loss, "val/main/bpb": loss / 2, "val/main/loss_stderr": 0.01}
        self.write(step=step, tokens=1024 * step, flops=10**6 * step, **values)

    def evaluate_whole(self, step: int, loss: float) -> None:
        values = {
            "val_full/main/loss": loss,
            "val_full/main/bpb": loss / 2,
            "data/main/valid_digest": "0123456789abcdef",
        }
        self.write(step=step, tokens=1024 * step, flops=10**6 * step, **values)


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """Killed at step 200 after a checkpoint at 150, resumed a minute later, finished."""
    workdir = tmp_path / "run-a"
    (workdir / "samples").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(CONFIG))
    clock = Clock(workdir)
    clock.start(0)
    clock.steps(0, 150)
    clock.evaluate(150, 2.0)
    clock.steps(150, 200)
    clock.now += 60
    clock.start(150)
    clock.steps(150, 300)
    clock.evaluate(300, 1.4)
    clock.steps(300, 400)
    clock.evaluate(400, 1.6)
    clock.write(event="end", status="finished")
    (workdir / "samples" / "90.txt").write_text("old")
    (workdir / "samples" / "400.txt").write_text("def f():\n    return 1")
    return workdir


def test_the_whole_set_is_a_point_of_its_own(workdir: Path) -> None:
    without = plot_loss(read_record(workdir))
    Clock(workdir).evaluate_whole(400, 1.3)
    write_report(workdir)
    text = (workdir / "report.md").read_text()
    for line in (
        "| main | final | 400 | 1.6000 | 0.8000 |",
        "| main | best | 300 | 1.4000 | 0.7000 |",
        "| main | final, whole set | 400 | 1.3000 | 0.6500 |",
        "main `0123456789abcdef`",
    ):
        assert line in text
    assert read_record(workdir).validation_sets == ["main"]
    assert plot_loss(read_record(workdir)) != without


def test_a_list_in_json_is_the_tuple_that_it_was(workdir: Path) -> None:
    """config.json knows no tuples."""
    (workdir / "config.json").write_text(json.dumps(CONFIG | {"model": {"pattern": ["global"], "dims": [[1, 2], [3]]}}))
    write_report(workdir, defaults=CONFIG | {"model": {"pattern": ("global",), "dims": ((1, 2), (4,))}})
    text = (workdir / "report.md").read_text()
    assert "`model.pattern`" not in text and "| `model.dims` | [[1, 2], [4]] | [[1, 2], [3]] |" in text


def test_the_report_says_what_there_is_to_say(workdir: Path) -> None:
    (workdir / "summary.json").write_text(json.dumps({"step": 400, "flops_6nd": 5, "val_full/main/xz_bpb": 1.6}))
    write_report(workdir, defaults=CONFIG | {"model": {"layers": 12}})
    text = (workdir / "report.md").read_text()
    for line in (
        "# run-a",
        "Finished at step 400 of 400.",
        "lmjax train --config=configs/x.py",
        "| git commit | abc |",
        "| `model.layers` | 12 | 2 |",
        "| main | final | 400 | 1.6000 | 0.8000 |",
        "| main | best | 300 | 1.4000 | 0.7000 |",
        "| val_full/main/xz_bpb | 1.6000 |",
        "| non-embedding | 600 |",
        "| tokens | 409,600 | 409,600 |",
        "| training FLOPs (causal) | 4e+08 | 4e+08 |",
        "| 1 | 1970-01-12 13:",
        "    return 1\n```",
    ):
        assert line in text, line
    assert "old" not in text and "train.steps" not in text
    assert "Median 2,048 tokens per second, 500.0 ms per step; no peak FLOP/s is known" in text
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_summary_that_the_run_has_gone_beyond_is_left_out(workdir: Path) -> None:
    """It was finished at step 300, and then given more steps."""
    (workdir / "summary.json").write_text(json.dumps({"step": 300, "flops_6nd": 5}))
    assert read_record(workdir).summary == {}
    (workdir / "summary.json").write_text(json.dumps({"step": 400, "flops_6nd": 5}))
    assert read_record(workdir).summary["flops_6nd"] == 5


def test_where_the_time_went(workdir: Path) -> None:
    record = read_record(workdir)
    assert [(a.start["step"], a.reached, a.status) for a in record.attempts] == [
        (0, 200, "killed"),
        (150, 400, "finished"),
    ]
    spent = time_spent(record.attempts)
    # A step counts 0.5 s also where the first interval of an attempt, which compiles, has no rate of its own.
    assert spent.between == 60
    assert spent.repeated == pytest.approx(0.5 * 50)
    assert spent.kept == pytest.approx(0.5 * 400)
    assert spent.total == pytest.approx(spent.kept + spent.repeated + spent.between + spent.other)


def test_a_run_that_died_at_once_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "metrics.jsonl").write_text("")
    write_report(tmp_path)
    assert "Not started at step 0 of 400." in (tmp_path / "report.md").read_text()
    Clock(tmp_path).start(0)
    write_report(tmp_path)
    assert "Running or killed at step 0 of 400." in (tmp_path / "report.md").read_text()


def test_mfu_comes_with_its_convention_and_nan_does_no_harm(workdir: Path) -> None:
    clock = Clock(workdir)
    clock.start(400)
    clock.steps(400, 440, **{"perf/mfu": 0.41})
    clock.write(step=450, tokens=1024 * 450, flops=1, **{"train/loss": "NaN"})
    write_report(workdir)
    text = (workdir / "report.md").read_text()
    assert "MFU 41.0%" in text and "causal attention" in text and "nan" not in text.lower().split("## attempts")[0]


def test_the_picture_is_made_without_a_display(workdir: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    assert len(plot_loss(read_record(workdir))) > 10_000
