"""Numbers that are not finite: the batch is named and kept, and its step can be done again and looked at."""

import re
from pathlib import Path

import pytest

from lmjax.record.tracking import read_jsonl
from tests.faults.black_box import copied, lmjax, train


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
