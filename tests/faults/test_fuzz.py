"""Thousands of damaged inputs of every kind: each gives the same result as the sound one, or an error of ours."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax import config
from lmjax.data.store.dataset import open_dataset, verify_dataset
from lmjax.record import inspect, seal, steps
from lmjax.record.jsonl import read_lines
from lmjax.record.ledger import check_ledger
from lmjax.record.report import write_report
from lmjax.record.tracking import read_events, read_jsonl
from lmjax.run.progress import check_meta
from tests.faults import tiny
from tests.faults.black_box import ENVIRONMENT, ROOT
from tests.faults.mutations import as_text, damaged, odd_document, refused

FIXTURE = ROOT / "tests" / "fixtures" / "stamped"


def counts(quick: int, whole: int) -> Any:
    return pytest.mark.parametrize("count", [quick, pytest.param(whole, marks=pytest.mark.slow)])


# Prepared data --------------------------------------------------------------------------------------------------------


def tokens_of(path: Path) -> list[bytes]:
    """All that training and evaluation read of a data set."""
    dataset = open_dataset(path)
    splits = [dataset.split("train"), dataset.split("valid")]
    return [one.take(one.document_starts[:-1], np.diff(one.document_starts)).tobytes() for one in splits]


@counts(150, 5000)
def test_shards(tmp_path: Path, count: int) -> None:
    path = Path(shutil.copytree(FIXTURE / "data", tmp_path / "data"))
    expected, unnoticed = tokens_of(path), 0
    shards = {file: file.read_bytes() for file in sorted(path.glob("*.*")) if file.name != "manifest.json"}
    for number in range(count):
        rng = random.Random(f"shards {number}")
        file = rng.choice(list(shards))
        file.write_bytes(damaged(shards[file], rng))
        with refused(number):
            assert tokens_of(path) == expected, number
            unnoticed += file.read_bytes() != shards[file]
        file.write_bytes(shards[file])
    assert unnoticed == 0 and tokens_of(path) == expected


@counts(150, 2500)
def test_manifests_of_data(tmp_path: Path, count: int) -> None:
    path = Path(shutil.copytree(FIXTURE / "data", tmp_path / "data"))
    expected, file = tokens_of(path), path / "manifest.json"
    text = file.read_bytes()
    for number in range(count):
        rng = random.Random(f"manifest {number}")
        if rng.random() < 0.3:
            file.write_bytes(damaged(text, rng))
        else:
            file.write_bytes(resealed(odd_document(json.loads(text), rng), rng).encode("utf-8", "backslashreplace"))
        with refused(number):
            assert tokens_of(path) == expected, number
            verify_dataset(path).tokenizer()


def resealed(content: Any, rng: random.Random) -> str:
    """As one who knows how would do it: nothing but the content tells."""

    def digest(values: Any) -> str:
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=32).hexdigest()

    if isinstance(content, dict):
        content.pop("seal", None)
        if rng.random() < 0.8:
            content["fingerprint"] = digest(
                {key: value for key, value in content.items() if key not in ("recipe", "fingerprint")}
            )
        content["seal"] = digest(content)
    return as_text(content, rng)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE / "run" / "checkpoints" / "8", tmp_path / "run" / "checkpoints" / "8"))


@counts(150, 2500)
def test_manifests_of_checkpoints(step: Path, count: int) -> None:
    file = step / seal.MANIFEST
    text = file.read_bytes()
    for number in range(count):
        rng = random.Random(f"seal {number}")
        if rng.random() < 0.3:
            file.write_bytes(damaged(text, rng))
        else:
            document = odd_document(json.loads(text), rng)
            if isinstance(document, dict):
                document.pop("self", None)
                with contextlib.suppress(ValueError):  # NaN, which no seal has
                    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
                    document["self"] = hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
            file.write_text(as_text(document, rng))
        with refused(number):
            found = inspect.inspect(step)
            inspect.format_inspection(found)
            assert found["step"] == 8
            check_meta(found["meta"], 8)


@counts(40, 400)
def test_files_of_checkpoints(step: Path, count: int) -> None:
    """Any change to any file is found."""
    contents = {path: path.read_bytes() for path in sorted(step.rglob("*")) if path.is_file()}
    for number in range(count):
        rng = random.Random(f"checkpoint {number}")
        path = rng.choice(list(contents))
        match rng.randrange(8):
            case 0:
                path.unlink()
            case 1:
                other = rng.choice(list(contents))
                path.write_bytes(contents[other])
            case 2:
                path.with_name(rng.choice(("extra", "x.py", ".hidden"))).write_bytes(b"x")
            case _:
                path.write_bytes(damaged(contents[path], rng))
        now = {path: path.read_bytes() for path in step.rglob("*") if path.is_file()}
        assert bool(steps.verify(step.parent) if (step / seal.MANIFEST).exists() else "gone") == (now != contents), (
            number
        )
        for path in now.keys() - contents.keys():
            path.unlink()
        for path, content in contents.items():
            path.write_bytes(content)


@counts(60, 1000)
def test_records_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Metrics and ledger: read as far as they can be, and a report is made of them."""
    run = Path(shutil.copytree(FIXTURE / "run", tmp_path / "run"))
    monkeypatch.setattr("lmjax.record.report.plot_loss", lambda record: b"")
    contents = {run / name: (run / name).read_bytes() for name in ("metrics.jsonl", "ledger.jsonl")}
    for number in range(count):
        rng = random.Random(f"records {number}")
        path = rng.choice(list(contents))
        lines = contents[path].splitlines(keepends=True)
        if rng.random() < 0.4:
            path.write_bytes(damaged(contents[path], rng))
        else:
            place = rng.randrange(len(lines))
            lines[place] = as_text(odd_document(json.loads(lines[place]), rng), rng).encode() + b"\n"
            path.write_bytes(b"".join(lines))
        with refused(number):
            list(read_lines(path)), read_events(run / "metrics.jsonl"), read_jsonl(run / "metrics.jsonl")
            check_ledger(run / "ledger.jsonl", {8: 32})
            write_report(run)
        path.write_bytes(contents[path])


# Configs --------------------------------------------------------------------------------------------------------------


def override(rng: random.Random, known: list[str]) -> str:
    key = rng.choice(known)
    if rng.random() < 0.2:
        key = rng.choice((key[:-1], key + ".x", key.upper(), key.replace(".", ".."), "", ".", key + "\0", "a.b.c"))
    values: list[Callable[[], str]] = [
        lambda: str(rng.choice((0, 1, -1, 2, 7, 64, 10**9, 2**63, 2**64, 10**400, 1e4, 1e-4, 1e308, -0.0))),
        lambda: rng.choice(
            ("nan", "inf", "-inf", "None", "True", "", " ", "1e4x", "()", "(1,)", "{}", "[]", "'a'", "a")
        ),
        lambda: "".join(rng.choices(string.printable + "é\x1b\u202e\ud800", k=rng.randrange(40))),
        lambda: rng.choice(
            ("(" * 300, "[" * 5000, "9" * 5000, "x" * 5000, "1_000", "0x10", "1e", "{'a': 1}", "-" * 100)
        ),
        lambda: rng.choice(("adamw", "cosine", "../x", "__import__('os')", "lambda: 0", "1 if 1 else 2", "b'x'", "1j")),
    ]
    return rng.choice((f"{key}={rng.choice(values)()}", f"{key}={rng.choice(values)()}", key))


@counts(400, 10_000)
def test_overrides(tmp_path: Path, count: int) -> None:
    file = config.ConfigFile(f"{tiny.__file__}:{tmp_path}")
    known = [*config.settings(file.config()), "train", "data.sources.a", "data.sources.new.path", "model.rope", "mesh"]
    accepted = 0
    for number in range(count):
        rng = random.Random(f"override {number}")
        given = [override(rng, known) for _ in range(rng.choice((1, 1, 2, 3)))]
        with refused(number):
            cfg = file.config(given)
            accepted += 1
            assert config.parse(json.loads(config.to_json(cfg))) == cfg, given
    assert 0 < accepted < count


# Imported files -------------------------------------------------------------------------------------------------------


@counts(60, 3000)
def test_safetensors(tmp_path: Path, count: int) -> None:
    """There is no checksum in them: what is read has the names, shapes and types that it should."""
    pytest.importorskip("safetensors")
    import jax

    from lmjax.hf.imported import Imported, read_checkpoint, write_checkpoint
    from lmjax.models import decoder
    from lmjax.models.config import ModelConfig
    from lmjax.weights import by_path, initialize

    cfg = ModelConfig(
        vocab=13, context=16, layers=2, embed=8, heads=2, mlp=8, activation="silu", gated=True, tied=False
    )
    params = initialize(decoder.weights(cfg), jax.random.key(0))
    write_checkpoint(tmp_path / "good", Imported(cfg, params, None, {}), shard_bytes=1000)
    shapes = {path: (x.shape, x.dtype) for path, x in by_path(read_checkpoint(tmp_path / "good").params).items()}
    contents = {path.name: path.read_bytes() for path in sorted((tmp_path / "good").iterdir())}
    for number in range(count):
        rng = random.Random(f"safetensors {number}")
        place = tmp_path / str(number)
        place.mkdir()
        name = rng.choice(list(contents))
        for other, content in contents.items():
            (place / other).write_bytes(content if other != name else broken(name, content, rng))
        with refused(number):
            found = read_checkpoint(place)
            if found.model == cfg:
                assert {path: (x.shape, x.dtype) for path, x in by_path(found.params).items()} == shapes
        shutil.rmtree(place)


def broken(name: str, content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damaged(content, rng)
    if name.endswith(".json"):
        return as_text(odd_document(json.loads(content), rng), rng).encode()
    length = int.from_bytes(content[:8], "little")
    header = as_text(odd_document(json.loads(content[8 : 8 + length]), rng), rng).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@counts(60, 500)
def test_tokenizers(tmp_path: Path, count: int) -> None:
    """Of every kind. Libraries in other languages read some of them: a crash there would be the end of a process."""
    pytest.importorskip("tokenizers")
    command = [sys.executable, "-m", "tests.faults.broken_tokenizers", str(tmp_path), str(count)]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, (ended.stdout[-200:], ended.stderr[-2000:])
    assert ended.stdout.splitlines()[-1] == f"{count} tokenizers"
