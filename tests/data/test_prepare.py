"""Preparing: the same bytes however it was run, nothing lost, nothing passed over in silence."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydantic
import pytest
import zstandard

from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.prepare.prepare import prepare
from lmjax.data.store.dataset import open_dataset, verify_dataset
from lmjax.data.store.manifest import read_manifest, write_manifest
from lmjax.data.tokenizers.load import train_tokenizer
from lmjax.errors import ConfigError, DataError
from lmjax.schema import validated

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
        "import sys; from lmjax.data.config import PrepareConfig; from lmjax.data.prepare.prepare import prepare\n"
        "import json, pydantic; cfg = pydantic.TypeAdapter(PrepareConfig).validate_json(sys.argv[1])\n"
        "prepare(cfg, sys.argv[2], progress=False)"
    )
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
        patch.setattr("lmjax.data.prepare.prepare.write_manifest", stop)
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


def test_a_half_made_data_set_of_another_recipe_is_left_alone(tmp_path, numbered_texts, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(numbered_texts))
    recipe = {"inputs": (f"{tmp_path}/*.txt",), "document_separator": "\n", "valid_fraction": 0.0, "workers": 1}
    target, cfg = tmp_path / "data", PrepareConfig(**recipe, tokenizer=BYTES, shard_tokens=2000)
    interrupt(cfg, target, monkeypatch)
    half = files_of(target)
    assert len([name for name in half if name.endswith(".tokens")]) > 10
    other = PrepareConfig(**recipe, tokenizer=TokenizerConfig(kind="chars"), shard_tokens=30_000)
    with pytest.raises(DataError, match=r"half-made data set of another recipe: shard_tokens was 2000, now 30000"):
        prepare(other, target, progress=False)
    assert files_of(target) == half
    prepare(cfg, target, progress=False)
    prepare(cfg, tmp_path / "fresh", progress=False)
    assert files_of(target) == files_of(tmp_path / "fresh")


def test_a_curation_that_has_not_ended_is_refused(tmp_path):
    """Its validation documents would be trained on."""
    (tmp_path / "curating").mkdir()
    for name in ("train-00000", "valid-00000"):
        (tmp_path / f"{name}.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "one"}\n'))
    cfg = PrepareConfig(inputs=(f"{tmp_path}/*.zst",), tokenizer=BYTES, workers=1)
    with pytest.raises(DataError, match="is a curation that has not ended; run lmjax curate again"):
        prepare(cfg, tmp_path / "data", progress=False)


def test_a_list_that_is_no_utf_8_is_counted_where_it_is_skipped(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "one"}, {"text": "\xff"}]')
    (tmp_path / "b.json").write_bytes(b'[{"text": "one"}, {"text": "two"}]')
    cfg = PrepareConfig(
        inputs=(f"{tmp_path}/*.json",), tokenizer=BYTES, workers=1, invalid_utf8="skip", valid_fraction=0
    )
    assert prepare(cfg, tmp_path / "data", progress=False).invalid_documents == 1


def test_a_recipe_that_was_interrupted_is_changed_and_run_again(tmp_path, capsys, monkeypatch):
    """Where no shard is finished, nothing is lost: the beginning of the other recipe makes way, and that is said."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n{"text": "two"}\n')
    cfg = PrepareConfig(inputs=(f"{tmp_path}/*.jsonl",), tokenizer=BYTES, valid_fraction=0, workers=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lmjax.data.prepare.prepare._encode", lambda *_: signal.raise_signal(signal.SIGINT))
        prepare(cfg, tmp_path / "data", progress=False)
    mended = dataclasses.replace(cfg, invalid_utf8="skip", tokenizer=TokenizerConfig(kind="chars"))
    prepare(mended, tmp_path / "data", progress=False)
    assert "starts over: invalid_utf8 was 'error', now 'skip'" in capsys.readouterr().err
    prepare(mended, tmp_path / "fresh", progress=False)
    assert files_of(tmp_path / "data") == files_of(tmp_path / "fresh")


def test_another_tokenizer_in_the_same_file_has_changed(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abc")
    train_tokenizer(TokenizerConfig(kind="chars"), ["abc"]).save(tmp_path / "tokenizer")
    given = TokenizerConfig(kind="file", path=f"{tmp_path}/tokenizer")
    cfg = PrepareConfig(inputs=(f"{tmp_path}/a.txt",), tokenizer=given, valid_fraction=0, workers=1)
    manifest = prepare(cfg, tmp_path / "data", progress=False)
    interrupt(cfg, tmp_path / "half", monkeypatch)
    train_tokenizer(TokenizerConfig(kind="chars"), ["abcd"]).save(tmp_path / "tokenizer")
    for name in ("data", "half"):
        with pytest.raises(DataError, match="tokenizer changed since"):
            prepare(cfg, tmp_path / name, progress=False)
    shutil.rmtree(tmp_path / "tokenizer")
    assert prepare(cfg, tmp_path / "data", progress=False) == manifest  # it is not needed any more
    with pytest.raises(DataError, match="tokenizer does not exist"):
        prepare(cfg, tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()  # found before anything was begun


def test_names_of_files_need_not_be_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(path).write_text("some text")
    cfg = PrepareConfig(inputs=(path,), tokenizer=BYTES, valid_fraction=0, workers=1)
    manifest = prepare(cfg, tmp_path / "data", progress=False)
    assert prepare(cfg, tmp_path / "data", progress=False).recipe == manifest.recipe


def test_inputs_in_the_output_directory_stay_as_they_are(tmp_path, numbered_texts):
    """Published data come as train-00000-of-00002.jsonl and the like."""
    names = ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "valid-00000.jsonl", "notes.txt"]
    for name in names:
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in numbered_texts))
    before = files_of(tmp_path)
    cfg = PrepareConfig(inputs=(f"{tmp_path}/*-0*.jsonl",), tokenizer=BYTES, workers=1)
    prepare(cfg, tmp_path, progress=False)
    assert {name: content for name, content in files_of(tmp_path).items() if name in names} == before
    assert not (tmp_path / "preparing").exists()
    verify_dataset(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "train-00000.tokens",
        "valid-00007.documents",
        "train-00000.checksums.tmp",
        "tokenizer/tokenizer.model",
        "preparing/recipe.json",
        "preparing/train-00000.json",
        "preparing/lock",
    ],
)
def test_files_of_others_under_names_to_be_written_are_not_touched(tmp_path, name):
    (tmp_path / "a.txt").write_text("some text of one's own\n" * 100)
    target = tmp_path / "data"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("somebody's work")
    cfg = PrepareConfig(inputs=(f"{tmp_path}/a.txt",), tokenizer=BYTES, workers=1)
    with pytest.raises(DataError, match=r"which no prepare has made there|is damaged"):
        prepare(cfg, target, progress=False)
    found = files_of(target)
    assert found.pop(name) == b"somebody's work"
    assert found in ({}, {"preparing/lock": b""})


def test_what_lies_beside_the_records_stays(tmp_path):
    (tmp_path / "a.txt").write_text("some text of one's own\n" * 100)
    (tmp_path / "data" / "preparing").mkdir(parents=True)
    (tmp_path / "data" / "preparing" / "notes.md").write_text("somebody's work")
    prepare(PrepareConfig(inputs=(f"{tmp_path}/a.txt",), tokenizer=BYTES, workers=1), tmp_path / "data", progress=False)
    assert [path.name for path in (tmp_path / "data" / "preparing").iterdir()] == ["notes.md"]


def test_an_input_edited_at_equal_size_has_changed(prepared, tmp_path, numbered_texts, monkeypatch):
    path, source = prepared(numbered_texts), tmp_path / "data.jsonl"
    cfg = PrepareConfig(inputs=(str(source),), tokenizer=BYTES, valid_fraction=0.0, workers=1)
    content = source.read_bytes()
    source.write_bytes(content)  # touched, not changed
    prepare(cfg, path, progress=False)
    source.write_bytes(content.replace(b"document 7", b"document 8", 1))
    assert source.stat().st_size == len(content)
    with pytest.raises(DataError, match="the input files changed since"):
        prepare(cfg, path, progress=False)
    source.write_bytes(content)
    interrupt(cfg, tmp_path / "half", monkeypatch)
    source.write_bytes(content.replace(b"document 7", b"document 8", 1))
    with pytest.raises(DataError, match="the input files changed since"):
        prepare(cfg, tmp_path / "half", progress=False)


def test_data_sets_of_earlier_versions_are_finished_still(prepared, tmp_path, numbered_texts):
    """Their recipes name neither the inputs' content nor settings that came later."""
    path = prepared(numbered_texts)
    manifest = read_manifest(path)
    known = {k: v for k, v in manifest.recipe.items() if k not in ("contents", "stamps", "division", "unknown")}
    write_manifest(dataclasses.replace(manifest, recipe=known), path)
    assert "unknown_documents" not in (path / "manifest.json").read_text()
    cfg = PrepareConfig(inputs=(str(tmp_path / "data.jsonl"),), tokenizer=BYTES, valid_fraction=0.0)
    assert prepare(cfg, path).fingerprint == manifest.fingerprint


@pytest.mark.parametrize("count", [1, 2, 5])
def test_of_few_documents_the_end_of_each_is_for_validation(tmp_path, capsys, count):
    texts = [f"poem {number}: " + "word " * 200 + f"end {number}" for number in range(count)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    cfg = PrepareConfig(inputs=(f"{tmp_path}/*.txt",), tokenizer=BYTES, seed=1, workers=1)
    manifest = prepare(cfg, tmp_path / "data")
    assert "the last 5.0% of each are it" in capsys.readouterr().err
    dataset = open_dataset(tmp_path / "data")
    tokenizer = dataset.tokenizer()
    parts = [
        [tokenizer.decode(ids[:-1].tolist()) for ids in documents_of(dataset.split(s))] for s in ("train", "valid")
    ]
    assert [first + last for first, last in zip(*parts, strict=True)] == texts
    assert all(len(last) == pytest.approx(0.05 * len(text), abs=1) for last, text in zip(parts[1], texts, strict=True))
    assert prepare(cfg, tmp_path / "data").fingerprint == manifest.fingerprint  # the same recipe still


def test_one_short_text_is_prepared_as_it_is(tmp_path, capsys):
    """With the default vocabulary, of which it can give a part."""
    text = "".join(f"Line {number} of a short text, {number * 7 % 13}.\n" for number in range(100))
    (tmp_path / "a.txt").write_text(text)
    manifest = prepare(PrepareConfig(inputs=(str(tmp_path / "a.txt"),), workers=1), tmp_path / "data")
    assert 256 < manifest.vocab_size < TokenizerConfig().vocab == 32_000
    assert f"more than this text can give: at most {manifest.vocab_size}" in capsys.readouterr().err
    assert sum(split.text_bytes for split in manifest.splits.values()) == len(text)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("content", "recipe"),
    [
        (b"\xff", {}),
        (b"a b", {"tokenizer": TokenizerConfig(vocab=100)}),
        (b"a b c", {"split": "tail", "document_separator": " "}),
        (b"a" * 9 + b"\nb\xff", {"document_separator": "\n", "valid_fraction": 0.0}),
    ],
)
def test_what_fails_before_its_first_shard_leaves_nothing(tmp_path, content, recipe, there):
    (tmp_path / "a.txt").write_bytes(content)
    target = tmp_path / "data"
    if there:
        target.mkdir()
        (target / "notes.md").write_text("mine")
    cfg = PrepareConfig(inputs=(str(tmp_path / "a.txt"),), workers=1, **({"tokenizer": BYTES} | recipe))
    with pytest.raises(DataError):
        prepare(cfg, target, progress=False)
    assert [path.name for path in target.rglob("*")] == ["notes.md"] if there else not target.exists()


def test_what_fails_later_keeps_its_shards(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 2_000_000 + b"\n" + b"b" * 10 + b"\n\xff")
    cfg = PrepareConfig(
        inputs=(str(tmp_path / "a.txt"),),
        tokenizer=BYTES,
        document_separator="\n",
        valid_fraction=0.0,
        shard_tokens=1000,
        workers=1,
    )
    with pytest.raises(DataError, match="invalid UTF-8"):
        prepare(cfg, tmp_path / "data", progress=False)
    assert (tmp_path / "data" / "preparing" / "train-00000.json").exists()


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
    for fraction in (1.0, 1e-300):
        with pytest.raises(ConfigError, match="valid_fraction"):
            validated(PrepareConfig, {"valid_fraction": fraction})


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


def test_the_end_of_text_does_not_stand_for_the_unknown(tmp_path, reference):
    (tmp_path / "a.txt").write_text("plain سلام words")
    model = reference / "tokenizers" / "t5_cc_all.32000.100extra.model"
    tokenizer = TokenizerConfig(kind="file", path=str(model), endoftext="<unk>")
    cfg = PrepareConfig(inputs=(str(tmp_path / "a.txt"),), tokenizer=tokenizer, unknown="replace", workers=1)
    with pytest.raises(DataError, match="'<unk>' stands for the unknown, too, and would end documents"):
        prepare(cfg, tmp_path / "data", progress=False)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("unknown", ["replace", "skip"])
def test_what_a_tokenizer_does_not_know_is_replaced_or_skipped_and_counted(
    tmp_path, reference, monkeypatch, capsys, workers, unknown
):
    texts = [f"plain words {number}" + " سلام" * (number % 3 == 1) for number in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = reference / "tokenizers" / "t5_cc_all.32000.100extra.model"
    cfg = PrepareConfig(
        inputs=(str(tmp_path / "a.jsonl"),),
        tokenizer=TokenizerConfig(kind="file", path=str(model)),
        unknown=unknown,
        valid_fraction=0.2,
        shard_tokens=20,
        workers=workers,
    )
    manifest = prepare(cfg, tmp_path / "data")
    assert "note: 10 documents, which the tokenizer cannot represent in full" in capsys.readouterr().err
    assert manifest.unknown_documents == 10
    assert sum(split.documents for split in manifest.splits.values()) == (30 if unknown == "replace" else 20)
    dataset = verify_dataset(tmp_path / "data")
    tokenizer = dataset.tokenizer()
    ids = np.concatenate([shard.tokens for name in ("train", "valid") for shard in dataset.split(name).shards])
    assert (ids == tokenizer.unknown_id).sum() == (10 if unknown == "replace" else 0)
    interrupt(cfg, tmp_path / "half", monkeypatch)
    for last in (tmp_path / "half" / "preparing").glob("*-00002.json"):
        last.unlink()  # as if killed before
    prepare(cfg, tmp_path / "half", progress=False)
    assert files_of(tmp_path / "half") == files_of(tmp_path / "data")


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
        "import resource, sys; from lmjax.data.config import *; from lmjax.data.prepare.prepare import prepare\n"
        "tokenizer = TokenizerConfig(vocab=290)\n"
        "cfg = PrepareConfig(inputs=(sys.argv[1],), tokenizer=tokenizer, valid_fraction=0, workers=1)\n"
        "print(prepare(cfg, sys.argv[2]).splits['train'].text_bytes)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(tmp_path / "data")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(output[0]) == 26 * 2_500_000 and int(output[1]) < 1_000_000
