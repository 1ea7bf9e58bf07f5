"""Shards: reads are exact across files, and every kind of damage is named before a token of it is used."""

import json
import os
import random
import re

import numpy as np
import pytest

from lmjax.data.store.dataset import open_dataset, verify_dataset
from lmjax.data.store.manifest import read_manifest
from lmjax.data.store.shards import token_dtype
from lmjax.errors import DataError


def read_everything(path):
    """All tokens of the training split, by the path that training uses."""
    split = open_dataset(path).split("train")
    starts = split.document_starts
    return split.take(starts[:-1], np.diff(starts))


@pytest.fixture
def dataset(prepared, numbered_texts):
    """Four shards of bytes and a validation split."""
    path = prepared(numbered_texts, shard_tokens=13_000, valid_fraction=0.1)
    assert len(open_dataset(path).split("train").shards) == 4
    return path


def test_spans_over_many_shards_come_in_the_order_asked_for(dataset):
    split = open_dataset(dataset).split("train")
    stream = np.concatenate([np.fromfile(shard.path, np.uint16) for shard in split.shards])
    rng = np.random.default_rng(0)
    which = rng.integers(0, split.n_documents, 300)
    starts, ends = split.document_starts[which], split.document_starts[which + 1]
    found = split.take(starts, ends - starts)
    assert np.array_equal(found, np.concatenate([stream[a:b] for a, b in zip(starts, ends, strict=True)]))
    assert found.dtype == np.uint16


def test_opening_reads_no_tokens(dataset, monkeypatch):
    split = open_dataset(dataset).split("train")
    assert split.n_tokens == sum(len(shard.tokens) for shard in split.shards)
    assert split._unchecked.all()


def test_the_digest_of_a_split_names_its_content(prepared, numbered_texts):
    """Wherever the data set lies, and of each split its own; one character makes another."""
    recipe = {"valid_fraction": 0.1, "shard_tokens": 13_000}
    first, copy = (open_dataset(prepared(numbered_texts, name=name, **recipe)) for name in ("first", "copy"))
    other = open_dataset(prepared([*numbered_texts[:-1], "another"], name="other", **recipe))
    digests = {dataset.split(name).digest for dataset in (first, other) for name in ("train", "valid")}
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in digests)
    assert [copy.split(name).digest for name in ("train", "valid")] == [
        first.manifest.splits[name].digest for name in ("train", "valid")
    ]
    assert len(digests) == 3 and first.split("valid").digest == other.split("valid").digest


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "one byte less":
        path.write_bytes(content[:-1])
    elif how == "half":
        path.write_bytes(content[: len(content) // 4 * 2])
    elif how == "64 KiB multiple":
        path.write_bytes(content[: len(content) & ~0xFFFF])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "longer":
        path.write_bytes(content + b"\0\0")
    elif how == "gone":
        path.unlink()
    elif how == "as uint32":
        path.write_bytes(np.frombuffer(content, "<u2").astype("<u4").tobytes())
    return path


SIZES = ["one byte less", "half", "64 KiB multiple", "empty", "longer", "gone", "as uint32"]


@pytest.mark.parametrize("how", SIZES)
@pytest.mark.parametrize("suffix", ["tokens", "documents", "checksums"])
def test_files_of_another_size_are_named_at_opening(dataset, suffix, how):
    path = dataset / f"train-00001.{suffix}"
    before = path.stat().st_size
    damage(path, how)
    if path.exists() and path.stat().st_size == before:
        return
    with pytest.raises(DataError) as caught:
        open_dataset(dataset)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert "missing" in message if how == "gone" else f"instead of {before}" in message


def test_any_flipped_bit_is_found_before_its_tokens_are_used(dataset):
    files = [path for path in sorted(dataset.glob("train-*")) if path.stat().st_size]
    for seed in range(60):
        rng = random.Random(seed)
        path = rng.choice(files)
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=path.name):
            read_everything(dataset)
        with pytest.raises(DataError, match=path.name):
            verify_dataset(dataset)
        path.write_bytes(content)
    read_everything(dataset)
    verify_dataset(dataset)


def test_damage_names_the_place(dataset):
    path = dataset / "train-00002.tokens"
    tokens = np.fromfile(path, np.uint16)
    tokens[5] ^= 1
    tokens.tofile(path)
    with pytest.raises(DataError, match=rf"{path}: tokens 0 to {len(tokens)} \(byte 0\) are damaged"):
        read_everything(dataset)
    tokens.byteswap().tofile(path)
    with pytest.raises(DataError, match="are damaged"):
        read_everything(dataset)


@pytest.mark.parametrize("token", [257, 65535])
def test_tokens_outside_the_vocabulary_are_located(dataset, monkeypatch, token):
    """Even where the checksum says that they were written so."""
    path = dataset / "train-00002.tokens"
    tokens = np.fromfile(path, np.uint16)
    tokens[1234] = token
    tokens.tofile(path)
    monkeypatch.setattr("lmjax.data.store.shards.TokenSplit._check", lambda *_: None)
    with pytest.raises(DataError, match=rf"{path}: token id {token} at token 1234 is outside the vocabulary of 257"):
        read_everything(dataset)


def test_a_damaged_manifest_is_refused(dataset):
    path = dataset / "manifest.json"
    text = path.read_text()
    good = read_manifest(open_dataset(dataset).path)
    content = json.loads(text)
    variants = [text[:-2], "", "null", "[]", "{}", "[" * 100_000, text.replace("uint16", "uint32"), "\xff" + text]
    for key in content:
        variants.append(json.dumps({name: value for name, value in content.items() if name != key}))
        variants += [json.dumps(content | {key: value}) for value in (-1, 2**63, None, float("nan"), "x", [], {"a": 1})]
    for seed in range(200):
        rng = random.Random(seed)
        place = rng.randrange(len(text))
        variants.append(text[:place] + rng.choice('0123456789abcdef"{}[]:, ') + text[place + 1 :])
    for variant in variants:
        path.write_text(variant, encoding="latin-1")
        try:
            found = read_manifest(open_dataset(dataset).path)
        except DataError as error:
            assert str(dataset) in str(error) and "\n" not in str(error)
        else:
            assert found == good


def test_manifests_cannot_point_elsewhere(dataset):
    """Even one that someone sealed."""
    from lmjax.data.store.manifest import _hash

    content = json.loads((dataset / "manifest.json").read_text())
    content["splits"]["train"]["shards"][0]["name"] = "../../etc/train-00000"
    del content["seal"]
    (dataset / "manifest.json").write_text(json.dumps(content | {"seal": _hash(content)}))
    with pytest.raises(DataError, match=r"is not a manifest of format 1: splits.train.shards.0.name"):
        open_dataset(dataset)


def test_another_tokenizer_is_refused(dataset):
    from lmjax.data.config import TokenizerConfig
    from lmjax.data.tokenizers.load import train_tokenizer

    assert open_dataset(dataset).tokenizer().hash == read_manifest(open_dataset(dataset).path).tokenizer_hash
    train_tokenizer(TokenizerConfig(kind="chars"), ["abc"]).save(dataset / "tokenizer")
    with pytest.raises(DataError, match="is not the one that the data set was made with"):
        open_dataset(dataset)


def test_splits_and_directories_that_are_not_there(prepared, tmp_path):
    path = prepared(["abc"])
    with pytest.raises(DataError, match="has no valid split"):
        open_dataset(path).split("valid")
    with pytest.raises(DataError, match="holds no prepared data set"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(DataError, match=r"install lmjax\[aws\]"):
        open_dataset("s3://bucket/data")


def test_a_span_that_leaves_its_shard_is_refused(dataset):
    split = open_dataset(dataset).split("train")
    assert len(split.shards) > 1
    with pytest.raises(AssertionError, match="leaves its shard"):
        split.take(np.array([0]), np.array([split.n_tokens]))
    shards = np.concatenate([shard.tokens for shard in split.shards])
    end = open_dataset(dataset).manifest.endoftext_id
    assert np.array_equal(np.concatenate([*split.documents()]), shards[shards != end])


def test_the_type_holds_the_vocabulary():
    assert [token_dtype(size) for size in (2, 65_536, 65_537, 1 << 31)] == ["uint16", "uint16", "uint32", "uint32"]
    with pytest.raises(DataError, match="must fit int32"):
        token_dtype((1 << 31) + 1)


def test_staging_copies_checks_and_reuses(dataset, tmp_path, monkeypatch):
    """A bucket is stood for by a folder."""
    monkeypatch.setattr("lmjax.record.files.is_remote", lambda path: str(path).startswith(str(dataset)))
    cache = str(tmp_path / "cache")
    staged = verify_dataset(dataset, cache=cache)
    assert str(staged.path).startswith(cache) and staged.manifest == read_manifest(staged.path)
    before = {path.name: os.stat(path).st_mtime_ns for path in staged.path.glob("train-*")}
    (staged.path / "train-00001.tokens").unlink()
    again = verify_dataset(dataset, cache=cache)
    changed = [path.name for path in again.path.glob("train-*") if before[path.name] != os.stat(path).st_mtime_ns]
    assert changed == ["train-00001.tokens"]
    damaged = staged.path / "train-00002.tokens"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")  # of the right size
    verify_dataset(dataset, cache=cache)
    monkeypatch.setattr("lmjax.record.files.hash_file", None)  # what nobody has touched is not read again
    open_dataset(dataset, cache=cache)
    monkeypatch.undo()
    monkeypatch.setattr("lmjax.record.files.is_remote", lambda path: str(path).startswith(str(dataset)))

    tokens = dataset / "train-00000.tokens"
    tokens.write_bytes(b"\1" + tokens.read_bytes()[1:])
    with pytest.raises(DataError, match=r"train-00000.tokens is damaged"):
        open_dataset(dataset, cache=str(tmp_path / "other"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DataError, match=r"10 bytes free but staging needs [0-9.]+ kB"):
        open_dataset(dataset, cache=str(tmp_path / "small"))
