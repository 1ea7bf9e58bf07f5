"""Files beside the checkpoints that are damaged: made again, or named with what to do; no bug, and no step is lost."""

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.black_box import CONFIG, copied, few, hashes, ledger, lmjax, train

DAMAGED = {
    "binary": bytes(range(256)) * 8,
    "empty": b"",
    "a list": b"[1, 2, 3]",
    "a number": b"3",
    "an object": b'{"step": "last", "event": "start", "attempt": [], "kind": 3}',
    "deep": b"[" * 100_000,
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "null": b"null\n",
}
REMADE = ("summary.json", "config.json", "report.md", "wandb_id", "tokenizer/tokenizer.description.json")


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    """The run as it was after step 8, but for its summary and its report."""
    workdir = copied(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "12")
    return workdir


@pytest.mark.parametrize("how", few(DAMAGED, ["binary", "null"]))
def test_what_can_be_made_again_is(corpus: Path, whole: Path, cut: Path, how: str) -> None:
    for name in REMADE:
        (cut / name).write_bytes(DAMAGED[how])
    train(corpus, cut).done()
    assert hashes(cut) == hashes(whole)
    for name in ("config.json", "summary.json", "wandb_id"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert "Finished at step 12 of 12" in (cut / "report.md").read_text()
    lmjax("generate", f"--workdir={cut}", "--prompt=a", "--tokens=4").done()
    lmjax("verify", cut).done()


@pytest.mark.parametrize("name", few(["summary.json", "config.json"], ["config.json"]))
@pytest.mark.parametrize("how", few(["binary", "a list"], ["a list"]))
def test_a_finished_run_mends_them_too(corpus: Path, whole: Path, tmp_path: Path, name: str, how: str) -> None:
    workdir = copied(whole, tmp_path / "run")
    (workdir / name).write_bytes(DAMAGED[how])
    train(corpus, workdir).done()
    assert (workdir / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("how", few(["absent", *DAMAGED], ["absent"]))
def test_a_finished_run_mends_its_tokenizer(corpus: Path, whole: Path, tmp_path: Path, how: str) -> None:
    workdir, name = copied(whole, tmp_path / "run"), "tokenizer/tokenizer.description.json"
    if how == "absent":
        shutil.rmtree(workdir / "tokenizer")
    else:
        (workdir / name).write_bytes(DAMAGED[how])
    train(corpus, workdir).done()
    assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_a_config_that_is_damaged_lets_no_other_run_in(corpus: Path, cut: Path) -> None:
    (cut / "config.json").write_bytes(DAMAGED["binary"])
    train(corpus, cut, "--config.train.seed=1").refused(2, "another config")
    assert (cut / "config.json").read_bytes() == DAMAGED["binary"]


@pytest.mark.parametrize("how", few(DAMAGED, ["an object"]))
@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl"])
def test_records_that_are_damaged_are_told_and_added_to(corpus: Path, cut: Path, name: str, how: str) -> None:
    """They cannot be made again, and the run does not need them to go on."""
    (cut / name).write_bytes(DAMAGED[how])
    ended = train(corpus, cut).done()
    if DAMAGED[how]:
        assert name in ended.err
    lines = (cut / name).read_bytes().splitlines()
    assert json.loads(lines[-1])
    if name == "ledger.jsonl":
        lmjax("verify", cut).refused(4, "sample")


@pytest.mark.parametrize("how", DAMAGED)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer/tokenizer.description.json", "checkpoints/12/LMJAX_MANIFEST.json"]
)
def test_other_commands_name_what_is_damaged(whole: Path, tmp_path: Path, name: str, how: str) -> None:
    workdir = copied(whole, tmp_path / "run")
    (workdir / name).write_bytes(DAMAGED[how])
    code = {"config.json": 2, "tokenizer/tokenizer.description.json": 3}.get(name, 4)
    for command in (("evaluate",), ("generate", "--prompt=a", "--tokens=4")):
        lmjax(*command, f"--workdir={workdir}").refused(code, name if code < 4 else "12")


def test_a_torn_line_is_told_and_its_step_read_again(corpus: Path, whole: Path, cut: Path) -> None:
    for name in ("ledger.jsonl", "metrics.jsonl"):
        content = (whole / name).read_bytes().splitlines(keepends=True)
        (cut / name).write_bytes(b"".join(content[:9]) + content[9][:17])
    ended = train(corpus, cut).done()
    for name in ("ledger.jsonl", "metrics.jsonl"):
        assert f"{name} ends in a torn line of 17 bytes, which is cut off" in ended.err
    assert ledger(cut)[-4:] == ledger(whole)[-4:]
    lmjax("verify", cut).done()


@pytest.mark.parametrize(
    "settings", few(["train.batch=16", "data.seed=3", "data.seq_len=16 train.batch=4"], ["data.seed=3"])
)
def test_a_run_whose_config_was_changed_verifies(corpus: Path, cut: Path, settings: str) -> None:
    words = [f"--config.{setting}" for setting in settings.split()]
    train(corpus, cut, *words, "--allow-config-change", "--allow-data-change").done()
    lmjax("verify", cut).done()


def test_files_where_folders_should_be_are_named(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """And folders where files should be."""
    for number, name in enumerate(("tokenizer", "checkpoints", "summary.json", "metrics.jsonl", "ledger.jsonl")):
        workdir = copied(whole, tmp_path / str(number))
        path = workdir / name
        shutil.rmtree(workdir / "checkpoints" / "12")
        if path.is_dir():
            shutil.rmtree(path)
            path.write_text("")
        else:
            path.unlink()
            path.mkdir()
        ended = lmjax("train", f"--config={CONFIG}:{corpus}", f"--workdir={workdir}")
        assert ended.code in (2, 3, 4), (name, ended)
        ended.refused(ended.code, name)
