"""Exit code 0 means that the last checkpoint is sealed and verifies, now; what is missing and can be made again is."""

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.black_box import copied, few, hashes, lmjax, train


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return copied(whole, tmp_path / "run")


def assert_whole(run: Path, whole: Path) -> None:
    """Everything that a finished run has, with the bits of one that nothing happened to."""
    assert hashes(run) == hashes(whole)
    assert json.loads((run / "summary.json").read_text()) == json.loads((whole / "summary.json").read_text())
    assert (run / "report.md").read_text().startswith("# run\n\nFinished at step 12 of 12.")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    lmjax("verify", run).done()


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_report_does_not_need_the_metrics(corpus: Path, run: Path) -> None:
    for name in ("report.md", "metrics.jsonl"):
        remove(run / name)
    train(corpus, run).done()
    assert (run / "report.md").exists()


@pytest.mark.parametrize("names", [["report.md"], ["loss.png"], ["report.md", "loss.png"]], ids=" ".join)
def test_a_report_that_is_missing_is_made(corpus: Path, whole: Path, run: Path, names: list[str]) -> None:
    for name in names:
        remove(run / name)
    assert "is finished after 12 steps" in train(corpus, run).done().out
    assert_whole(run, whole)


@pytest.mark.parametrize("name", ["report.md", "loss.png"])
def test_a_report_that_is_empty_is_made(corpus: Path, whole: Path, run: Path, name: str) -> None:
    (run / name).write_bytes(b"")
    train(corpus, run).done()
    assert_whole(run, whole)


@pytest.mark.parametrize(
    "names", few(["summary.json", "checkpoints/12", "summary.json report.md config.json"], ["checkpoints/12"])
)
def test_what_is_missing_of_the_end_is_made(corpus: Path, whole: Path, run: Path, names: str) -> None:
    """The last steps are taken again, the last evaluation made again, to the same bits."""
    for name in names.split():
        remove(run / name)
    train(corpus, run).done()
    assert_whole(run, whole)


@pytest.mark.parametrize("name", few(["state/_METADATA", "LMJAX_MANIFEST.json"], ["state/_METADATA"]))
def test_a_last_checkpoint_that_is_damaged_is_made_again(corpus: Path, whole: Path, run: Path, name: str) -> None:
    path = run / "checkpoints" / "12" / name
    path.write_bytes(path.read_bytes()[:-3])
    train(corpus, run).done()
    assert_whole(run, whole)
    assert list(run.glob("checkpoints/12.corrupt-*"))


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/8", "checkpoints/SEALED"])
def test_without_any_checkpoint_it_never_starts_from_nothing(corpus: Path, run: Path, name: str) -> None:
    """Whatever is left that says that there was one."""
    for path in ("checkpoints/12", "checkpoints/8"):
        remove(run / path)
    if (run / name).exists():
        remove(run / name)
    for summary in (True, False):
        if not summary:
            (run / "summary.json").unlink()
        train(corpus, run).refused(4, str(run))
    assert not list(run.glob("checkpoints/*/LMJAX_MANIFEST.json"))


@pytest.mark.parametrize("site", few(["summary.write", "report.write", "report.between"], ["report.between"]))
@pytest.mark.parametrize("fault", ["kill", "disk_full"])
def test_an_end_that_is_cut_short_is_made_up_for(corpus: Path, whole: Path, run: Path, site: str, fault: str) -> None:
    for name in ("summary.json", "report.md", "loss.png"):
        remove(run / name)
    ended = train(corpus, run, LMJAX_FAULTS=f"{fault}@{site}:1")
    assert ended.code == {"kill": -9, "disk_full": 4}[fault], ended
    assert "Traceback" not in ended.err
    train(corpus, run).done()
    assert_whole(run, whole)
