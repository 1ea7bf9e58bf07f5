"""Numbers that are not finite: the batch is named and kept, and its step can be done again and looked at."""

import re
from pathlib import Path

import pytest

from lmjax.record.tracking import read_jsonl
from tests.faults.black_box import copied, hashes, lmjax, train


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_too_many_steps_that_are_not_finite_name_and_keep_their_batches(corpus: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    faults = ",".join(f"nan_grad@step:{step}" for step in (5, 6, 7))
    result = train(corpus, workdir, "--config.train.max_skipped_in_a_row=2", LMJAX_FAULTS=faults)
    result.refused(5, "step 7", "3 steps in a row", "steps 5 to 7, samples 32 to 55", f"lmjax replay {workdir} 7")
    assert sorted(path.name for path in (workdir / "batches").iterdir()) == ["5.npz", "6.npz", "7.npz"]
    before = contents(workdir)
    again = lmjax("replay", workdir, 7).done().out.splitlines()
    assert "from the checkpoint of step 4: samples 48 to 55, as it was kept" in again[0]
    assert "loss nan" in again[-1] and "skipped 1.0" in again[-1]
    assert re.search(r"embed .* nan  \d+$", "\n".join(again), re.MULTILINE)
    assert contents(workdir) == before


def test_a_step_that_is_done_again_has_the_numbers_that_it_had(whole: Path) -> None:
    before = contents(whole)
    out = lmjax("replay", whole, 11).done().out.splitlines()
    row = next(row for row in read_jsonl(whole / "metrics.jsonl") if row["step"] == 11)
    assert "step 11 of" in out[0] and "from the checkpoint of step 8: samples 80 to 87" in out[0]
    assert f"loss {row['train/loss']!r}  " in out[-1] and f"grad_norm {row['optim/grad_norm']!r}" in out[-1]
    names = [line.split()[0] for line in out[2:-1]]
    assert len(names) > 8 and all(float(line.split()[-1]) >= 0 for line in out[2:-1])
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [((8,), 4, "no checkpoint before step 8 (sealed steps: 8, 12)"), ((0,), 2, "STEP"), (("x",), 2, "STEP")],
)
def test_a_step_that_cannot_be_done_again(whole: Path, words: tuple[object, ...], code: int, said: str) -> None:
    lmjax("replay", whole, *words).refused(code, said)


def test_a_kept_batch_that_is_damaged_is_named(whole: Path, tmp_path: Path) -> None:
    workdir = copied(whole, tmp_path / "run")
    (workdir / "batches").mkdir()
    (workdir / "batches" / "10.npz").write_bytes(b"PK\x03\x04 and no more")
    lmjax("replay", workdir, 10).refused(4, "batches/10.npz is damaged", "remove it")


# Spikes ---------------------------------------------------------------------------------------------------------------

LONG = ("--config.train.steps=84", "--config.checkpoint.every=80", "--config.train.evaluate_every=84")


def spikes(workdir: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(workdir / "metrics.jsonl") if row.get("optim/spikes")]


def test_a_spike_is_left_out_and_a_restart_decides_the_same(corpus: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words, faults = (*LONG, "--config.train.skip_spikes=6"), "spike@step:20,spike@step:82"
    train(corpus, whole, *words, LMJAX_FAULTS=faults).done()
    assert spikes(whole) == [82]  # at step 20 nothing is judged yet
    row = next(row for row in read_jsonl(whole / "metrics.jsonl") if row["step"] == 82)
    assert row["optim/skipped"] == 1 and row["train/loss"] > 0
    assert train(corpus, cut, *words, LMJAX_FAULTS=faults + ",kill@step:81").code == -9
    train(corpus, cut, *words, LMJAX_FAULTS=faults).done()
    assert spikes(cut) == [82] and hashes(cut) == hashes(whole)


@pytest.mark.slow
def test_without_it_nothing_is_left_out(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path / "run", *LONG, LMJAX_FAULTS="spike@step:82").done()
    assert spikes(tmp_path / "run") == [] and hashes(tmp_path / "run")


# Copies ---------------------------------------------------------------------------------------------------------------


def test_a_bit_that_flips_in_one_copy_is_found_and_the_device_named(corpus: Path, tmp_path: Path) -> None:
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    words = ("--config.train.check_replicas=3", "--config.checkpoint.every=100", "--config.model.vocab=264")
    result = train(corpus, tmp_path / "run", *words, LMJAX_FAULTS="flip@step:4", **devices)
    result.refused(5, "step 6", "on device 3 of process 0 differs from the others")
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")][-1] <= 6


@pytest.mark.slow
def test_copies_are_compared_before_they_are_saved(corpus: Path, tmp_path: Path) -> None:
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    words = ("--config.train.check_replicas=100", "--config.model.vocab=264")
    result = train(corpus, tmp_path / "run", *words, LMJAX_FAULTS="flip@step:6", **devices)
    result.refused(5, "step 8", "on device 0 of process 0, device 1 of process 0 differs from each other")
    assert not (tmp_path / "run" / "checkpoints" / "8").exists()


# Pace -----------------------------------------------------------------------------------------------------------------


def test_a_step_that_takes_far_too_long_is_told(corpus: Path, tmp_path: Path) -> None:
    words = ("--config.train.steps=24", "--config.train.evaluate_every=24", "--config.checkpoint.every=24")
    result = train(corpus, tmp_path / "run", *words, LMJAX_FAULTS="pause@step:20").done()
    told = [line for line in result.err.splitlines() if "straggler: step 20 took" in line]
    assert len(told) == 1 and "it is this process that is late" in told[0], result.err
