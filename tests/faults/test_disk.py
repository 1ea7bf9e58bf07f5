"""A disk that is really full: one line names the file, what it needs and what is free; with room again all goes on."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.black_box import Result, hashes, ledger, lmjax, train

ROOM = r"\(.*needs .*\d (bytes|kB), \d.* (bytes|kB) free\)"

Resize = Callable[[str], None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Resize]]:
    """A file system of its own, and what gives it another size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("to mount a small file system takes root")
    yield disk, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True) and None
    subprocess.run(["umount", disk], check=True)


def said_in_one_line(result: Result, code: int, path: Path) -> None:
    line = result.refused(code, str(path), "No space left on device")
    assert re.search(ROOM, line), line
    assert not [other for other in result.err.splitlines() if "Error" in other and other != line], result.err


@pytest.mark.parametrize(
    ("size", "file"),
    [
        ("8k", "config.json"),
        pytest.param("16k", "tokenizer/", marks=pytest.mark.slow),
        pytest.param("20k", "metrics.jsonl", marks=pytest.mark.slow),
        pytest.param("30k", "", marks=pytest.mark.slow),  # the save, or the line after it
        pytest.param("300k", "checkpoints/8", marks=pytest.mark.slow),
        ("600k", "checkpoints/12"),  # the last save
    ],
)
def test_training_goes_on_where_there_is_room_again(
    corpus: Path, whole: Path, small_disk: tuple[Path, Resize], size: str, file: str
) -> None:
    disk, resize = small_disk
    workdir = disk / "run"
    resize(size)
    said_in_one_line(train(corpus, workdir), 4, workdir / file)
    assert not list(workdir.glob("checkpoints/*tmp*")) and not list(workdir.glob("*.tmp"))
    resize("8m")
    train(corpus, workdir).done()
    assert hashes(workdir) == hashes(whole)
    assert sorted(set(ledger(workdir))) == ledger(whole)


@pytest.mark.parametrize("size", ["20k", pytest.param("8k", marks=pytest.mark.slow)])
def test_prepared_data_are_the_same_where_there_is_room_again(
    corpus: Path, tmp_path: Path, small_disk: tuple[Path, Resize], size: str
) -> None:
    disk, resize = small_disk
    words = ("prepare", corpus / "a" / "*.txt", "--tokenizer=bytes", "--workers=1")
    expected = lmjax(*words, f"--out={tmp_path / 'there'}").done().out.split()[-1]
    resize(size)
    said_in_one_line(lmjax(*words, f"--out={disk / 'here'}"), 3, disk / "here")
    assert not (disk / "here" / "manifest.json").exists()
    resize("1m")
    assert lmjax(*words, f"--out={disk / 'here'}").done().out.split()[-1] == expected
