"""Going back past samples that did harm: those are left out, all others read once, and the old branch is kept."""

import json
from pathlib import Path

import pytest

from tests.faults.black_box import copied, finished, hashes, ledger, lmjax, start, train, wait_for


@pytest.fixture(scope="module")
def rolled_back(corpus: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, back to step 8 of 12, and trained to its end without the 16 samples after it."""
    workdir = copied(whole, tmp_path_factory.mktemp("rolled") / "run")
    said = lmjax("rollback", workdir, "--to=8", "--skip-samples=16").done().out
    assert "12.abandoned-" in said and "summary.json.abandoned-" in said and "goes on from step 8" in said
    train(corpus, workdir).done()
    return workdir


def test_exactly_those_samples_are_left_out(whole: Path, rolled_back: Path) -> None:
    before, after = ledger(whole), ledger(rolled_back)
    assert after[: len(before)] == before
    assert [(step, first, count) for step, first, count, _ in after[len(before) :]] == [
        (9, 80, 8),
        (10, 88, 8),
        (11, 96, 8),
        (12, 104, 8),
    ]
    assert [crc for *_, crc in after[len(before) :]][:2] == [crc for *_, crc in before[10:12]]
    lmjax("verify", rolled_back).done()
    summary = json.loads((rolled_back / "summary.json").read_text())
    assert (summary["step"], summary["tokens"]) == (12, 12 * 8 * 32)


def test_it_is_on_record_and_the_old_branch_is_kept(whole: Path, rolled_back: Path) -> None:
    manifest = json.loads((rolled_back / "checkpoints" / "12" / "LMJAX_MANIFEST.json").read_text())
    assert manifest["meta"]["left_out"] == [[64, 16]] and manifest["meta"]["data"]["next_sample"] == 112
    lines = (rolled_back / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["rollback"] for line in lines if "rollback" in line] == [
        {"step": 8, "first_sample": 64, "skip": 16}
    ]
    (aside,) = rolled_back.glob("checkpoints/12.abandoned-*")
    lmjax("verify", aside).done()
    assert hashes(aside) == hashes(whole) != hashes(rolled_back)


def test_a_kill_on_the_way_changes_nothing(corpus: Path, whole: Path, rolled_back: Path, tmp_path: Path) -> None:
    workdir = copied(whole, tmp_path / "run")
    words = ("rollback", workdir, "--to=8", "--skip-samples=16")
    assert lmjax(*words, LMJAX_FAULTS="kill@rollback.aside:1").code == -9
    lmjax(*words).done()
    assert train(corpus, workdir, LMJAX_FAULTS="kill@step:10").code == -9
    assert train(corpus, workdir, LMJAX_FAULTS="terminate@step:11").code == 75
    train(corpus, workdir).done()
    assert hashes(workdir) == hashes(rolled_back)
    lmjax("verify", workdir).done()


def test_a_checkpoint_from_before_it_is_not_gone_on_from(corpus: Path, rolled_back: Path, tmp_path: Path) -> None:
    workdir = copied(rolled_back, tmp_path / "run")
    lmjax("rollback", workdir, "--to=12", "--skip-samples=8").done()
    (workdir / "checkpoints" / "12" / "state" / "_METADATA").write_text("{}")
    train(corpus, workdir).refused(4, "was rolled back to step 12, whose checkpoint is gone", "--to=8")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--to=6",), 4, "no sealed checkpoint of step 6 (sealed steps: 8, 12)"),
        (("--to=0",), 2, "--to"),
        (("--to=8", "--skip-samples=-1"), 2, "--skip-samples"),
        ((), 2, "--to"),
    ],
)
def test_what_cannot_be_is_refused(whole: Path, words: tuple[str, ...], code: int, said: str) -> None:
    before = sorted(whole.rglob("*"))
    lmjax("rollback", whole, *words).refused(code, said)
    assert sorted(whole.rglob("*")) == before


def test_a_damaged_checkpoint_and_what_is_no_run_are_refused(whole: Path, tmp_path: Path) -> None:
    workdir = copied(whole, tmp_path / "run")
    (workdir / "checkpoints" / "8" / "state" / "_METADATA").write_text("{}")
    lmjax("rollback", workdir, "--to=8").refused(4, "checkpoints/8 is damaged")
    assert (workdir / "summary.json").exists() and (workdir / "checkpoints" / "12").exists()
    lmjax("rollback", tmp_path, "--to=8").refused(2, "is not the work directory of a run")


def test_not_while_it_trains(corpus: Path, tmp_path: Path) -> None:
    words = ("train", f"--config=tests/faults/tiny.py:{corpus}", f"--workdir={tmp_path / 'run'}")
    running = start(*words, LMJAX_FAULTS="stall@step:6")
    wait_for(lambda: (tmp_path / "run" / "checkpoints" / "4" / "LMJAX_MANIFEST.json").exists(), running)
    try:
        lmjax("rollback", tmp_path / "run", "--to=4").refused(6, "another process trains in")
    finally:
        running.kill()
        finished(running)
