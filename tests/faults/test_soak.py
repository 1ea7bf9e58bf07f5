"""What a long run, many saves and many kills leave behind: nothing that grows."""

import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.black_box import CONFIG, finished, hashes, start, train, wait_for

pytestmark = pytest.mark.slow

TINY = ("model.embed=16", "model.heads=1", "model.mlp=16", "train.batch=4", "train.evaluate_every=100000")


class Held(NamedTuple):
    """By a process, now."""

    megabytes: float
    files: int
    threads: int


def least(pid: int, looks: int = 100) -> Held:
    """What a process holds between saves, each of which has files and threads of its own."""
    found = []
    for _ in range(looks):
        found.append(held(pid))
        time.sleep(0.01)
    return Held(*map(min, zip(*found, strict=True)))


def held(pid: int) -> Held:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Held(int(status["VmRSS"].split()[0]) / 1e3, files, int(status["Threads"]))


def step_of(workdir: Path) -> int:
    """The newest step that was logged."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)
    except FileNotFoundError:
        return 0


def grown(corpus: Path, workdir: Path, *, steps: int, every: int) -> tuple[Held, Held]:
    """What a run held after a tenth of its steps, and after nine."""
    settings = (*TINY, f"train.steps={steps}", f"checkpoint.every={every}", f"train.log_every={steps // 100}")
    words = [f"--config={CONFIG}:{corpus}", f"--workdir={workdir}", *(f"--config.{one}" for one in settings)]
    process = start("train", *words)
    found = []
    for share in (0.1, 0.9):
        wait_for(lambda share=share: step_of(workdir) >= share * steps, process)
        found.append(least(process.pid))
    finished(process).done()
    return found[0], found[1]


def test_ten_thousand_steps_take_no_more_than_a_thousand(corpus: Path, tmp_path: Path) -> None:
    early, late = grown(corpus, tmp_path / "run", steps=10_000, every=10_000)
    assert late.megabytes - early.megabytes <= 25, (early, late)
    assert (late.files, late.threads) == (early.files, early.threads)


def test_two_hundred_saves_take_no_more_than_twenty(corpus: Path, tmp_path: Path) -> None:
    early, late = grown(corpus, tmp_path / "run", steps=2_000, every=10)
    assert late.megabytes - early.megabytes <= 25, (early, late)
    assert late.files == early.files and late.threads <= early.threads + 2  # pools that fill as they are used


def test_thirty_kills_leave_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    """Each after two checkpoints more at most; the thirty-first attempt ends the run."""
    settings = tuple(f"--config.{one}" for one in (*TINY, "train.steps=128", "checkpoint.every=4"))
    train(corpus, tmp_path / "whole", *settings).done()
    for kill in range(1, 31):
        assert train(corpus, tmp_path / "run", *settings, LMJAX_FAULTS=f"kill@step:{4 * kill + 3}").code == -9
    train(corpus, tmp_path / "run", *settings).done()
    names = [
        {path.relative_to(place).as_posix() for path in place.rglob("*")}
        for place in (tmp_path / "run", tmp_path / "whole")
    ]
    assert {name for name in names[0] ^ names[1] if "/d/" not in name} == set()  # whose names are random
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")
    assert not list(Path("/dev/shm").glob("lmjax*")) and shutil.disk_usage(tmp_path).free
