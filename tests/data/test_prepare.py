"""Preparing: the same bytes however it was run, nothing lost, nothing passed over in silence."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.prepare import prepare
from lmjax.data.shards import open_dataset, verify_dataset
from lmjax.errors import DataError

BYTES = TokenizerConfig(kind="bytes")


def files_of(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def documents_of(split):
    tokens = split.take(np.array([0]), np.array([split.n_tokens])) if len(split.shards) == 1 else None
    if tokens is None:
        tokens = np.concatenate([shard.tokens for shard in split.shards])
    return [tokens[a:b] for a, b in zip(split.document_starts[:-1], split.document_starts[1:], strict=True)]


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_every_document_is_there_once_closed_by_endoftext(prepared, numbered_texts, kind):
    tokenizer = TokenizerConfig(kind=kind, vocab=320) if kind == "bpe" else TokenizerConfig(kind=kind)
    path = prepared(numbered_texts, tokenizer=tokenizer, valid_fraction=0.1, shard_tokens=5000)
    dataset = verify_dataset(path)
    tokenizer = dataset.tokenizer()
    found = []
    for name in ("train", "valid"):
        split = dataset.split(name)
        texts = []
        for tokens in documents_of(split):
            assert tokens[-1] == tokenizer.endoftext_id and tokenizer.endoftext_id not in tokens[:-1]
            texts.append(tokenizer.decode(tokens[:-1].tolist()))
        assert split.n_bytes == sum(len(text.encode()) for text in texts)
        assert split.n_documents == len(texts)
        assert texts == [text for text in numbered_texts if text in texts]  # in the order of the corpus
        found += texts
    assert sorted(found) == sorted(numbered_texts)
    assert len(dataset.split("valid").document_starts) - 1 == 20
    assert len(dataset.split("train").shards) > 1 or kind != "bytes"


def test_the_number_of_workers_changes_nothing(prepared, numbered_texts):
    texts = [text * 60 for text in numbered_texts]  # enough for several requests
    recipe = {"tokenizer": TokenizerConfig(vocab=300), "valid_fraction": 0.1, "shard_tokens": 50_000}
    one, three = (prepared(texts, workers=workers, name=f"w{workers}", **recipe) for workers in (1, 3))
    first, second = files_of(one), files_of(three)
    differing = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    assert differing <= {"manifest.json"}  # the recipe in it names the input file
    assert open_dataset(one).manifest.fingerprint == open_dataset(three).manifest.fingerprint


def start(cfg: PrepareConfig, target: Path) -> subprocess.Popen:
    code = (
        "import sys; from lmjax.data.config import PrepareConfig; from lmjax.data.prepare import prepare\n"
        "import json, pydantic; cfg = pydantic.TypeAdapter(PrepareConfig).validate_json(sys.argv[1])\n"
        "prepare(cfg, sys.argv[2], progress=False)"
    )
    import pydantic

    text = pydantic.TypeAdapter(PrepareConfig).dump_json(cfg).decode()
    return subprocess.Popen([sys.executable, "-c", code, text, str(target)])


def test_killed_at_any_time_and_run_again_gives_the_same_bytes(tmp_path, numbered_texts):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text * 100}) + "\n" for text in numbered_texts))
    cfg = PrepareConfig(
        inputs=(str(source),), tokenizer=TokenizerConfig(vocab=300), valid_fraction=0.1, shard_tokens=20_000, workers=1
    )
    prepare(cfg, tmp_path / "whole", progress=False)
    expected = files_of(tmp_path / "whole")
    target = tmp_path / "killed"
    shards_at_kill = []
    for wanted in (0, 2, 4):  # kill when so many shards are done
        process = start(cfg, target)
        while process.poll() is None and len(list(target.glob("preparing/train-*.json"))) < wanted:
            time.sleep(0.002)
        process.kill()
        process.wait()
        if (target / "manifest.json").exists():
            break  # it was quicker than the kill
        shards_at_kill.append(len(list(target.glob("preparing/train-*.json"))))
        with pytest.raises(DataError, match="holds no prepared data set"):
            open_dataset(target)
    assert shards_at_kill == sorted(shards_at_kill)  # work that was done is kept
    prepare(cfg, target, progress=False)
    assert files_of(target) == expected


def interrupt(cfg, target, monkeypatch):
    """Prepare, but stop just before the manifest."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lmjax.data.prepare.write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(cfg, target, progress=False)
    assert not (target / "manifest.json").exists()


def test_a_damaged_half_is_not_built_upon(prepared, tmp_path, numbered_texts, monkeypatch):
    """An interrupted run leaves a shard that someone then damages: it is written anew."""
    recipe = {"shard_tokens": 5000}
    expected = files_of(prepared(numbered_texts, **recipe))
    cfg = PrepareConfig(
        inputs=(str(tmp_path / "data.jsonl"),), tokenizer=BYTES, valid_fraction=0.0, workers=1, **recipe
    )
    target = tmp_path / "again"
    interrupt(cfg, target, monkeypatch)
    shard = target / "train-00002.tokens"
    shard.write_bytes(shard.read_bytes()[:-2])
    prepare(cfg, target, progress=False)
    assert files_of(target) == expected


def test_finished_is_left_alone_and_another_recipe_refused(prepared, tmp_path, numbered_texts):
    path = prepared(numbered_texts)
    source = tmp_path / "data.jsonl"
    cfg = PrepareConfig(inputs=(str(source),), tokenizer=BYTES, valid_fraction=0.0)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert prepare(cfg, path).fingerprint == open_dataset(path).manifest.fingerprint
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    other = PrepareConfig(inputs=(str(source),), tokenizer=TokenizerConfig(kind="chars"), valid_fraction=0.0)
    with pytest.raises(DataError, match=r"prepared differently: tokenizer.kind was 'bytes', now 'chars'"):
        prepare(other, path)
    source.write_text(source.read_text() + '{"text": "more"}\n')
    with pytest.raises(DataError, match="the input files changed since"):
        prepare(cfg, path)
    source.unlink()
    prepare(cfg, path)  # the text is not needed any more


def test_another_recipe_starts_an_unfinished_directory_afresh(tmp_path, numbered_texts, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(numbered_texts))
    recipe = {"inputs": (f"{tmp_path}/*.txt",), "document_separator": "\n", "valid_fraction": 0.0, "workers": 1}
    target = tmp_path / "data"
    interrupt(PrepareConfig(**recipe, tokenizer=BYTES, shard_tokens=2000), target, monkeypatch)
    assert len(list(target.glob("train-*.tokens"))) > 10
    cfg = PrepareConfig(**recipe, tokenizer=TokenizerConfig(kind="chars"), shard_tokens=30_000)
    prepare(cfg, target, progress=False)
    prepare(cfg, tmp_path / "fresh", progress=False)
    assert files_of(target) == files_of(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no text in .*: every document is empty or was skipped"),
        (b'{"text": ""}\n\n{"text": ""}\n', "no text in .*: every document is empty or was skipped"),
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "bpe", "chars"])
def test_nothing_to_prepare(tmp_path, content, message, kind):
    (tmp_path / "a.jsonl").write_bytes(content)
    cfg = PrepareConfig(inputs=(str(tmp_path / "a.jsonl"),), tokenizer=TokenizerConfig(kind=kind), workers=1)
    with pytest.raises(DataError, match=message if kind == "bytes" else "empty|no text"):
        prepare(cfg, tmp_path / "data", progress=False)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_splits_that_cannot_be(prepared):
    with pytest.raises(DataError, match=r"none of the 3 documents fell to validation .* \(sure from 1000 documents\)"):
        prepared(["a", "b", "c"], valid_fraction=0.001)
    with pytest.raises(DataError, match=r"valid_fraction=1.0 took all 3"):
        prepared(["a", "b", "c"], name="other", valid_fraction=1.0)


def test_omitted_documents_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": ""}\n{"text": "\xff"}\n{"text": " "}\n')
    cfg = PrepareConfig(
        inputs=(str(tmp_path / "a.jsonl"),), tokenizer=BYTES, invalid_utf8="skip", valid_fraction=0.0, workers=1
    )
    manifest = prepare(cfg, tmp_path / "data", progress=False)
    assert (manifest.empty_documents, manifest.invalid_documents) == (1, 1)
    assert manifest.splits["train"].documents == 2 and manifest.splits["train"].tokens == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_that_cannot_be_encoded_is_named(tmp_path, reference, workers):
    texts = ["plain words", "plain words", "سلام", "plain words"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = reference / "tokenizers" / "t5_cc_all.32000.100extra.model"
    cfg = PrepareConfig(
        inputs=(str(tmp_path / "a.jsonl"),), tokenizer=TokenizerConfig(kind="file", path=str(model)), workers=workers
    )
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: character 'س' is unknown to the tokenizer"):
        prepare(cfg, tmp_path / "data", progress=False)


def test_a_lossy_tokenizer_is_told_by_its_count(tmp_path, reference, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one  two"}\n{"text": "one two"}\n')
    model = reference / "tokenizers" / "t5_cc_all.32000.100extra.model"
    cfg = PrepareConfig(
        inputs=(str(tmp_path / "a.jsonl"),),
        tokenizer=TokenizerConfig(kind="file", path=str(model)),
        valid_fraction=0.0,
        workers=1,
    )
    manifest = prepare(cfg, tmp_path / "data")
    assert manifest.splits["train"].inexact_documents == 1
    assert "1 of 2 documents decode to other text" in capsys.readouterr().err


def test_a_worker_that_dies_is_an_error(tmp_path, monkeypatch, numbered_texts):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text * 100}) + "\n" for text in numbered_texts))
    cfg = PrepareConfig(inputs=(str(tmp_path / "a.jsonl"),), tokenizer=BYTES, workers=2)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="an encoding process died with exit code 1"):
        prepare(cfg, tmp_path / "data", progress=False)


def test_vocabularies_beyond_uint16_get_uint32(tmp_path):
    import tokenizers
    from tokenizers import models, pre_tokenizers

    vocabulary = {f"w{number}": number for number in range(70_000)} | {"<|endoftext|>": 70_000, "[UNK]": 70_001}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w0 w65535 w65536 w69999")
    cfg = PrepareConfig(
        inputs=(str(tmp_path / "a.txt"),),
        tokenizer=TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json")),
        valid_fraction=0.0,
        workers=1,
    )
    manifest = prepare(cfg, tmp_path / "data", progress=False)
    assert manifest.dtype == "uint32" and manifest.vocab_size == 70_002
    split = open_dataset(tmp_path / "data").split("train")
    assert split.take(np.array([0]), np.array([5])).tolist() == [0, 65535, 65536, 69999, 70_000]
    (tmp_path / "a.txt").write_text("w0 unheard")
    with pytest.raises(DataError, match=r"a\.txt: 'unheard' is unknown to the tokenizer"):
        prepare(cfg, tmp_path / "other", progress=False)


def test_a_full_disk_loses_nothing(prepared, tmp_path, numbered_texts, monkeypatch):
    expected = files_of(prepared(numbered_texts, shard_tokens=5000))
    cfg = PrepareConfig(
        inputs=(str(tmp_path / "data.jsonl"),), tokenizer=BYTES, valid_fraction=0.0, workers=1, shard_tokens=5000
    )

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"cannot write .*: No space left on device"):
            prepare(cfg, tmp_path / "again", progress=False)
    assert not list((tmp_path / "again").rglob("*.tmp"))
    prepare(cfg, tmp_path / "again", progress=False)
    assert files_of(tmp_path / "again") == expected


def test_an_unusable_target_is_named(prepared, tmp_path):
    (tmp_path / "occupied").write_text("a file")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"cannot write .*occupied"):
        prepare(PrepareConfig(inputs=(str(tmp_path / "a.txt"),)), tmp_path / "occupied" / "data")


@pytest.mark.slow
def test_a_very_long_line_takes_little_memory(tmp_path):
    line = json.dumps({"text": "some words of a long line " * 2_500_000})
    (tmp_path / "a.jsonl").write_text(line)
    code = (
        "import resource, sys; from lmjax.data.config import *; from lmjax.data.prepare import prepare\n"
        "tokenizer = TokenizerConfig(vocab=290)\n"
        "cfg = PrepareConfig(inputs=(sys.argv[1],), tokenizer=tokenizer, valid_fraction=0, workers=1)\n"
        "print(prepare(cfg, sys.argv[2]).splits['train'].text_bytes)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(tmp_path / "data")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(output[0]) == 26 * 2_500_000 and int(output[1]) < 1_000_000
