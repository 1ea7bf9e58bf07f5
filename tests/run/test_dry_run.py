"""What a config would cost is said from shapes and manifests alone."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmjax.config import Config, parse
from lmjax.data.config import PrepareConfig, SourceConfig, TokenizerConfig
from lmjax.data.prepare.prepare import prepare
from lmjax.data.store import manifest
from lmjax.errors import ConfigError, DataError
from lmjax.run.dry_run import describe, with_known_vocab

PATH = "~/data/prepared"


def config(path: str, **model: Any) -> Config:
    """100 steps of 4 rows of 16 tokens."""
    cfg = parse(
        {
            "model": {"layers": 1, "embed": 8, "heads": 2, "mlp": 16, **model},
            "data": {"seq_len": 16},
            "train": {"batch": 4, "steps": 100},
            "optimizer": {"schedule": {"warmup": 5}},
        }
    )
    return replace(cfg, data=replace(cfg.data, sources={"text": SourceConfig(path=path)}))


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What PATH expands to."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("one two three " * 50)
    recipe = PrepareConfig(
        inputs=(str(tmp_path / "text.txt"),), tokenizer=TokenizerConfig(kind="bytes"), split="tail", workers=1
    )
    prepare(recipe, tmp_path / "data/prepared")
    return tmp_path / "data/prepared"


def test_only_the_manifest_is_read(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is: a bucket is stood for by a folder."""
    before, found = list(describe(config(PATH))), manifest.read_manifest(dataset)
    tokens = found.splits["train"].tokens
    assert before[-1] == f"data         text: {tokens:,} tokens, {100 * 4 * 16 / tokens:.2f} epochs"
    assert with_known_vocab(config(PATH)).model.vocab == found.vocab_size
    monkeypatch.setattr("lmjax.record.files.is_remote", lambda path: True)
    for path in dataset.iterdir():
        if path.name != manifest.FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert list(describe(config(PATH))) == before


def test_epochs_of_whole_documents_are_of_the_rows_that_they_fill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven documents of 11 tokens, their ends among them, fill a row of 17 each. In a bucket, whose lengths are not
    read, rows are taken to be full."""
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text("0123456789")
    recipe = PrepareConfig(
        inputs=(f"{tmp_path}/*.txt",), tokenizer=TokenizerConfig(kind="bytes"), valid_fraction=0, workers=1
    )
    prepare(recipe, tmp_path / "prepared")
    cfg = config(str(tmp_path / "prepared"))
    cfg = replace(cfg, data=replace(cfg.data, documents="whole"))
    assert list(describe(cfg))[-1] == f"data         text: 77 tokens, {400 / 7:.2f} epochs"
    monkeypatch.setattr("lmjax.record.files.is_remote", lambda path: True)
    assert list(describe(cfg))[-1] == f"data         text: 77 tokens, at most {400 * 17 / 77:.2f} epochs"


def test_a_model_that_nothing_holds_is_no_bug() -> None:
    with pytest.raises(ConfigError, match="parameters, more than can be held; make it smaller"):
        list(describe(config(PATH, vocab=64, embed=1 << 24, heads=1 << 24, head_dim=1 << 24)))


def test_a_data_set_may_be_missing_but_not_damaged_or_out_of_reach(dataset: Path) -> None:
    assert list(describe(config(f"{PATH}2", vocab=64)))[-1] == "data         text: not prepared yet"
    with pytest.raises(DataError, match=r"install lmjax\[aws\]"):
        list(describe(config("s3://bucket/data", vocab=64)))
    (dataset / manifest.FILE).write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        list(describe(config(PATH, vocab=64)))


def test_it_says_by_what_the_step_attends() -> None:
    assert "attention    xla, on this machine" in describe(config(PATH, vocab=64, attention="xla"))


def test_a_known_vocabulary_is_not_looked_for() -> None:
    cfg = config("s3://bucket/data", vocab=64)
    assert with_known_vocab(cfg) is cfg
