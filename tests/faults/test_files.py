"""Shards and text that change, are cut off, are too many, or are not what the manifest says."""

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.black_box import copied, few, hashes, ledger, lmjax, together, train

LONG = ("--config.train.steps=20000", "--config.train.evaluate_every=None", "--config.checkpoint.every=1000")


@pytest.fixture
def place(corpus: Path, whole: Path, tmp_path: Path) -> Path:
    """The text and its prepared data, in a place of the test's own."""
    for name in ("a", "b", "a.prepared", "b.prepared"):
        copied(corpus / name, tmp_path / name)
    return tmp_path


# Under a running job --------------------------------------------------------------------------------------------------


def disturbed(place: Path, what: Callable[[Path], object], *words: str) -> Any:
    shard = place / "a.prepared" / "train-00000.tokens"
    return together(
        lambda: train(place, place / "run", *words),
        meanwhile=lambda: what(shard),
        ready=lambda: (place / "run" / "ledger.jsonl").exists() and len(ledger(place / "run")) > 5,
    )


def test_a_shard_that_is_cut_off_is_named(place: Path) -> None:
    disturbed(place, lambda shard: os.truncate(shard, 0), *LONG).refused(3, "train-00000.tokens has 0 bytes instead of")


def test_a_shard_that_is_deleted_is_named(place: Path) -> None:
    disturbed(place, lambda shard: shard.unlink(), *LONG).refused(3, "train-00000.tokens", "No such file")


def test_a_shard_that_is_overwritten_is_checked_again(place: Path) -> None:
    def overwrite(shard: Path) -> None:
        content = bytearray(shard.read_bytes())
        content[1000::2] = b"b" * len(content[1000::2])
        with shard.open("r+b") as file:
            file.write(content)

    disturbed(place, overwrite, *LONG).refused(3, "train-00000.tokens", "are damaged: checksum differs")


def test_a_shard_that_is_written_as_it_was_is_read_on(place: Path) -> None:
    def rewrite(shard: Path) -> None:
        content = shard.read_bytes()
        os.utime(shard)
        with shard.open("r+b") as file:
            file.write(content)
        shutil.copy(shard, shard.with_suffix(".copy"))
        shard.with_suffix(".copy").rename(shard)

    steps = "--config.train.steps=400", *LONG[1:]
    disturbed(place, rewrite, *steps).done()


@pytest.mark.parametrize(("shards", "files"), few([(120, 110), (600, 256)], [(120, 110)]))
def test_there_may_be_more_shards_than_file_descriptors(place: Path, whole: Path, shards: int, files: int) -> None:
    (place / "a" / "many.txt").write_text("")
    for number in range(shards):
        (place / "a" / f"{number}.txt").write_text(f"{number} " * 40)
    shutil.rmtree(place / "a.prepared")
    limits = ((resource.RLIMIT_NOFILE, files),)
    recipe = ("--tokenizer=bytes", "--valid-fraction=0.2", "--shard-tokens=10", "--workers=1")
    lmjax("prepare", f"{place}/a/*.txt", f"--out={place}/a.prepared", *recipe, limits=limits).done()
    assert len(list(place.glob("a.prepared/*.tokens"))) == shards
    words = ("--config.data.sources.a.prepare=None", "--config.train.steps=4", "--config.optimizer.schedule.warmup=2")
    train(place, place / "run", *words, limits=limits).done()
    lmjax("verify", place / "a.prepared", limits=limits).done()


# What the manifest lists ----------------------------------------------------------------------------------------------


def reseal(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest as another program, or another hand, could have sealed it."""
    content = json.loads((directory / "manifest.json").read_text())
    for name in ("seal", "fingerprint"):
        del content[name]
    change(content)
    unnamed = {key: value for key, value in content.items() if key != "recipe"}
    content["fingerprint"] = digest(unnamed)
    (directory / "manifest.json").write_text(json.dumps(content | {"seal": digest(content)}))


def digest(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=32).hexdigest()


def twice(content: dict[str, Any]) -> None:
    split = content["splits"]["train"]
    split["shards"] *= 2
    for total in ("tokens", "documents", "text_bytes", "inexact_documents"):
        split[total] *= 2


def more(content: dict[str, Any]) -> None:
    content["splits"]["train"]["tokens"] += 1


def other_split(content: dict[str, Any]) -> None:
    content["splits"]["train"] = content["splits"].pop("valid")


def end_outside(content: dict[str, Any]) -> None:
    content["endoftext_id"] = 257


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (twice, "train-00000 is listed twice"),
        (more, "tokens is not the sum of its shards'"),
        (other_split, "train lists shards of another split"),
        (end_outside, "endoftext_id=257 is outside the vocabulary of 257"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(place: Path, change: Callable[..., None], said: str) -> None:
    reseal(place / "a.prepared", lambda content: None)
    lmjax("verify", place / "a.prepared").done()
    reseal(place / "a.prepared", change)
    lmjax("verify", place / "a.prepared").refused(3, "manifest.json", said)
    train(place, place / "run").refused(3, "manifest.json", said)
    assert not (place / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["train-00001.tokens", "valid-00007.documents"])
def test_a_shard_that_is_not_listed_is_refused(place: Path, name: str) -> None:
    (place / "a.prepared" / name).write_bytes(b"\0\0")
    lmjax("verify", place / "a.prepared").refused(3, f"{name} is not listed in the manifest")
    train(place, place / "run").refused(3, f"{name} is not listed in the manifest")


# Text that changes ----------------------------------------------------------------------------------------------------

RECIPE = ("--tokenizer=bytes", "--valid-fraction=0.2", "--shard-tokens=1000", "--workers=1")


def prepare(text: Path, out: Path, **environment: str) -> Any:
    return lmjax("prepare", f"{text}/*.txt", f"--out={out}", *RECIPE, **environment)


def edit(text: Path, number: int = 3) -> None:
    """At the same size, as `sed -i` does."""
    path = text / f"{number}.txt"
    path.write_text(path.read_text().replace("e", "z"))


def test_text_that_was_edited_in_place_is_noticed(place: Path) -> None:
    prepare(place / "a", place / "out").done()
    before = (place / "out" / "manifest.json").read_bytes()
    prepare(place / "a", place / "out").done()
    edit(place / "a")
    prepare(place / "a", place / "out").refused(3, "the input files changed since")
    assert (place / "out" / "manifest.json").read_bytes() == before


def test_old_and_new_text_are_not_mixed(place: Path) -> None:
    content = (place / "a" / "3.txt").read_text()
    assert prepare(place / "a", place / "out", LMJAX_FAULTS="kill@prepare.shard:3").code == -9
    edit(place / "a")
    prepare(place / "a", place / "out").refused(3, "the input files changed since")
    (place / "a" / "3.txt").write_text(content)
    prepare(place / "a", place / "out").done()
    prepare(place / "a", place / "undisturbed").done()
    fingerprints = [
        json.loads((place / name / "manifest.json").read_text())["fingerprint"] for name in ("out", "undisturbed")
    ]
    assert fingerprints[0] == fingerprints[1]


def test_text_that_is_edited_while_it_is_read_is_noticed(place: Path) -> None:
    for number in range(60):
        (place / "a" / f"{number}.txt").write_text("some words of text " * 60)
    ended = together(
        lambda: prepare(place / "a", place / "out"),
        meanwhile=lambda: edit(place / "a", 0),
        ready=lambda: (place / "out" / "preparing" / "train-00002.json").exists(),
    )
    ended.refused(3, "the input files changed since", "delete that directory")
    assert not (place / "out" / "manifest.json").exists()
    train_words = ("--config.data.sources.a.prepare=None", f"--config.data.sources.a.path={place / 'out'}")
    train(place, place / "run", *train_words).refused(3, "holds no prepared data set")


def test_text_and_its_data_may_be_moved_together(place: Path) -> None:
    prepare(place / "a", place / "out").done()
    before = (place / "out" / "manifest.json").read_bytes()
    (place / "moved").mkdir()
    for name in ("a", "out"):
        (place / name).rename(place / "moved" / name)
    prepare(place / "moved" / "a", place / "moved" / "out").done()
    assert (place / "moved" / "out" / "manifest.json").read_bytes() == before
    edit(place / "moved" / "a")
    prepare(place / "moved" / "a", place / "moved" / "out").refused(3, "the input files changed since")


def test_a_run_may_be_moved_with_its_data(place: Path, whole: Path) -> None:
    workdir = copied(whole, place / "run")
    shutil.rmtree(workdir / "checkpoints" / "12")
    train(place, workdir).done()
    assert hashes(workdir) == hashes(whole) and ledger(workdir)[-4:] == ledger(whole)[-4:]
    edit(place / "a")
    shutil.rmtree(place / "a.prepared")
    prepare(place / "a", place / "a.prepared").done()
    train(place, copied(whole, place / "other")).refused(2, "another config", "data.sources.a.path")
