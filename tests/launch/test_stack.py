"""Cells that train together in one process, and are told apart in everything else."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from launch import cell, stack, status
from launch.__main__ import main
from launch.engines import local
from launch.job import Hardware, Job
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


def sweep(corpus: Path, out: Path, *flags: str) -> list[str]:
    listed = out.parent / "cells.json"
    listed.write_text(json.dumps(CELLS))
    config = f"{ROOT}/tests/tiny_config.py:{corpus}"
    return ["sweep", config, f"--cells={listed}", f"--out={out}", "--jobs=1", *SHORT, *flags]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_cells_of_equal_shapes_train_together_and_are_told_apart(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "launch", *sweep(corpus, out, "--stack=auto")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "4 cells in 2 processes" in done.stdout
    assert "of the cells 0, 1, 2 the first to fail ended with exit code 5" in done.stdout
    rows = status.rows(out)
    assert [row.state for row in rows] == ["done", "failed", "done", "done"]
    assert rows[1].why.startswith("exit code 5: lmjax: error: step 4: the loss or its gradient was not finite")
    assert rows[0].pid == rows[1].pid == rows[2].pid != rows[3].pid
    logs = [(out / "logs" / f"{index:04d}.log").read_text() for index in range(4)]
    assert [log.count("step 20/20") for log in logs] == [1, 0, 1, 1]
    assert not any("[000" in log for log in logs)
    events = [json.loads(line) for line in (out / "attempts" / "0001.jsonl").read_text().splitlines()]
    assert [(event["event"], event.get("code")) for event in events] == [("started", None), ("ended", 5)]
    assert rows[1].spent_hours < rows[0].spent_hours  # it is over when it ends, not when all do


def test_each_hears_what_is_its_own(tmp_path: Path) -> None:
    """What has no label, or that of no cell, is for all; an end stands, whatever comes after it."""
    say = """
import sys
print("[0000] step 1/2\\nfor all\\n[other] too", flush=True)
print("[0001] lmjax: error: diverged\\n[0001] lmjax: exit code 5", file=sys.stderr, flush=True)
print("[0000] saving\\n[0000] lmjax: exit code 0", file=sys.stderr)
sys.exit(5)
"""
    with contextlib.ExitStack() as opened:
        cells = {
            f"{entry.index:04d}": cell.Cell(epath.Path(tmp_path), entry, 0, opened, together=2)
            for entry in entries("a", "a")
        }
        code = cell.train([sys.executable, "-c", say], cells)
        for one in cells.values():
            one.end(code)
    assert code == 5
    logs = [(tmp_path / "logs" / f"000{i}.log").read_text() for i in range(2)]
    assert [line for line in logs[0].splitlines() if "exit" not in line and "saving" not in line] == [
        "step 1/2",
        "for all",
        "[other] too",
    ]
    assert "step 1/2" not in logs[1] and "for all" in logs[1] and "error: diverged" in logs[1]
    notes = [(tmp_path / "attempts" / f"000{i}.jsonl").read_text().splitlines() for i in range(2)]
    assert all(json.loads(started)["together"] == 2 for started, _ in notes)
    ended = [json.loads(end) for _, end in notes]
    assert [(end["code"], end["last"]) for end in ended] == [(0, ""), (5, "lmjax: error: diverged")]


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


def test_branches_stack_with_those_of_their_trunk() -> None:
    arguments = Namespace(engine="local", jobs=1, stack=None)
    made = stack.jobs("s", "DIR", entries(*"aaaaaa"), arguments, after={2: 0, 3: 1, 4: 0})
    assert [(job.cells, job.after) for job in made] == [((0, 1, 5), None), ((2, 4), 0), ((3,), 1)]


@pytest.mark.parametrize(("state", "order"), [("done", "02"), ("failed", "0")])
def test_a_branch_starts_where_its_trunk_is_done_though_others_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, order: str
) -> None:
    rows = [Namespace(index=0, state=state), Namespace(index=1, state="failed")]
    monkeypatch.setattr(status, "rows", lambda directory: rows)
    monkeypatch.setattr(status, "headline", lambda rows: "")
    tell = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
    command = (sys.executable, "-c", tell, str(tmp_path / "order"))
    jobs = [Job(0, "a", (*command, "0", "5"), {}, 1.0, None, (1,)), Job(2, "b", (*command, "2", "0"), {}, 1.0, 0)]
    assert local.submit("s", str(tmp_path), jobs, Hardware(), Namespace(jobs=1, retries=0)) == 1
    assert (tmp_path / "order").read_text() == order


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
    (entry,) = entries("a")
    attempts = tmp_path / entry.attempts
    attempts.parent.mkdir()
    notes = [
        {"event": "started", "time": 0.0, "host": "h", "pid": 1, "together": 4},
        {"event": "ended", "time": 7200.0, "code": 75, "last": ""},
        {"event": "started", "time": 8000.0, "host": "h", "pid": 2},
        {"event": "ended", "time": 11600.0, "code": 75, "last": ""},
    ]
    attempts.write_text("".join(json.dumps(note) + "\n" for note in notes))
    assert status.row(epath.Path(tmp_path), entry).spent_hours == 1.5
