"""Cells that train together in one process, and are told apart in everything else."""

import dataclasses
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from launch import stack, status
from launch.__main__ import main
from launch.manifest import Entry
from lmjax.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHORT = [
    "--config.train.steps=20",
    "--config.checkpoint.every=5",
    "--config.train.evaluate_every=None",
    "--config.train.sample.prompts=()",
    "--config.train.max_skipped_in_a_row=2",
]
CELLS: list[dict[str, Any]] = [
    {"train.seed": 0},
    {"train.seed": 0, "optimizer.learning_rate": 1e30},
    {"train.seed": 1},
    {"model.mlp": 48},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    for name in ("a", "b"):
        (directory / name).mkdir()
        for number in range(8):
            text = " ".join(f"{name}{number * word % 97}" for word in range(300))
            (directory / name / f"{number}.txt").write_text(text)
    return directory


def sweep(corpus: Path, out: Path, *flags: str) -> list[str]:
    listed = out.parent / "cells.json"
    listed.write_text(json.dumps(CELLS))
    config = f"{ROOT}/tests/tiny_config.py:{corpus}"
    return ["sweep", config, f"--cells={listed}", f"--out={out}", "--jobs=1", *SHORT, *flags]


def test_cells_of_equal_shapes_train_together_and_are_told_apart(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "launch", *sweep(corpus, out, "--stack=auto")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "4 cells in 2 processes" in done.stdout
    assert "of the cells 0, 1, 2 the first to fail ended with exit code 5" in done.stdout
    rows = status.rows(out)
    assert [row.state for row in rows] == ["done", "failed", "done", "done"]
    assert rows[1].why.startswith("exit code 5: lmjax: error: step 3: the loss or its gradient was not finite")
    assert rows[0].pid == rows[1].pid == rows[2].pid != rows[3].pid
    logs = [(out / "logs" / f"{index:04d}.log").read_text() for index in range(4)]
    assert [log.count("step 20/20") for log in logs] == [1, 0, 1, 1]
    assert not any("[000" in log for log in logs)
    events = [json.loads(line) for line in (out / "attempts" / "0001.jsonl").read_text().splitlines()]
    assert [(event["event"], event.get("code")) for event in events] == [("started", None), ("ended", 5)]
    assert rows[1].spent_hours < rows[0].spent_hours  # it is over when it ends, not when all do


def entries(*programs: str) -> list[Entry]:
    blank: dict[str, Any] = {field.name: None for field in dataclasses.fields(Entry)}
    blank |= {"flops": 1, "steps": 1, "first_step": 0}
    return [Entry(**blank | {"index": i, "program": one, "digest": str(i)}) for i, one in enumerate(programs)]


@pytest.mark.parametrize(
    ("programs", "jobs", "size", "stacks"),
    [
        ("aaaaa", 1, None, ["0,1,2,3,4"]),
        ("aaaaa", 2, None, ["0,2,4", "1,3"]),
        ("abab", 1, None, ["0,2", "1,3"]),
        ("ab", 1, None, ["0", "1"]),
        ("aaaaaaaaa", 1, None, ["0,2,4,6,8", "1,3,5,7"]),  # at most 8, and equally many
        ("aaaa", 2, 4, ["0,1,2,3"]),
        ("aaaa", 1, 1, ["0", "1", "2", "3"]),
    ],
)
def test_cells_are_dealt_out(programs: str, jobs: int, size: int | None, stacks: list[str]) -> None:
    made = stack.jobs("s", "DIR", entries(*programs), Namespace(engine="local", jobs=jobs, stack=size))
    assert [job.command[-1] for job in made] == stacks
    assert [job.flops for job in made] == [len(cells.split(",")) for cells in stacks]


def test_cells_of_an_older_sweep_train_alone() -> None:
    made = stack.jobs("s", "DIR", entries("", ""), Namespace(engine="local", jobs=1, stack=None))
    assert [job.command[-1] for job in made] == ["0", "1"]


def test_other_engines_start_each_cell_alone() -> None:
    arguments = Namespace(engine="slurm", jobs=None, stack=4)
    with pytest.raises(ConfigError, match="--engine=slurm starts each cell alone"):
        stack.jobs("s", "DIR", entries("a", "a"), arguments)
    arguments.stack = None
    assert len(stack.jobs("s", "DIR", entries("a", "a"), arguments)) == 2


@pytest.mark.parametrize(("flag", "problem"), [("--stack=0", "neither auto nor"), ("--stack=x", "neither auto nor")])
def test_a_stack_is_a_number_of_cells(corpus: Path, tmp_path: Path, flag: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        main(sweep(corpus, tmp_path / "new", flag))


@pytest.mark.parametrize("cells", ["3,3", "a", "1,", ""])
def test_a_list_of_cells_is_one(cells: str) -> None:
    with pytest.raises(ConfigError, match="is not a list of different cells"):
        main(["cell", "DIR", cells])


def test_time_is_shared_out(tmp_path: Path) -> None:
    (cell,) = entries("a")
    cell = dataclasses.replace(cell, steps=1)
    attempts = tmp_path / cell.attempts
    attempts.parent.mkdir()
    notes = [
        {"event": "started", "time": 0.0, "host": "h", "pid": 1, "together": 4},
        {"event": "ended", "time": 7200.0, "code": 75, "last": ""},
        {"event": "started", "time": 8000.0, "host": "h", "pid": 2},
        {"event": "ended", "time": 11600.0, "code": 75, "last": ""},
    ]
    attempts.write_text("".join(json.dumps(note) + "\n" for note in notes))
    assert status.row(epath.Path(tmp_path), cell).spent_hours == 1.5
