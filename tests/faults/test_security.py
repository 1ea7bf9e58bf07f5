"""What a run writes is its owner's alone, holds no secret, and goes where it should; what it reads is bounded."""

import gzip
import hashlib
import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.faults.black_box import Result, copied, lmjax, train

# Whose files they are -------------------------------------------------------------------------------------------------


def test_only_the_owner_reads_what_a_run_writes(corpus: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        train(corpus, tmp_path / "run", "--config.train.steps=6").done()
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]}
    assert len(modes) > 20
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}


# Links ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json.tmp", "summary.json.tmp", ".writable.tmp", ".lock", "report.md.tmp"])
def test_a_planted_link_is_not_followed(corpus: Path, whole: Path, tmp_path: Path, name: str) -> None:
    workdir, victim = copied(whole, tmp_path / "run"), tmp_path / "victim"
    for file in ("summary.json", "report.md"):
        (workdir / file).unlink()
    victim.write_text("as it was")
    (workdir / name).unlink(missing_ok=True)
    (workdir / name).symlink_to(victim)
    train(corpus, workdir).refused(4, name)
    assert victim.read_text() == "as it was" and (workdir / name).is_symlink()


def test_a_draft_that_a_kill_left_gives_way(corpus: Path, whole: Path, tmp_path: Path) -> None:
    workdir = copied(whole, tmp_path / "run")
    (workdir / "report.md").unlink()
    (workdir / "report.md.tmp").write_text("half of")
    train(corpus, workdir).done()
    assert not (workdir / "report.md.tmp").exists() and (workdir / "report.md").exists()


# Secrets --------------------------------------------------------------------------------------------------------------

CANARY = "canary-0123456789abcdef"
FORM = "hf_0123456789abcdefghijklmnopqrstuv"


def holding(directory: Path, secret: str) -> list[str]:
    return [str(path) for path in directory.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("secret", "words", "environment"),
    [
        (CANARY, (f"--config.tracking.name={CANARY}", f"--config.tracking.tags=('{CANARY}',)"), {"MY_API_KEY": CANARY}),
        pytest.param(FORM, (f"--config.train.sample.prompts=('{FORM}',)",), {}, marks=pytest.mark.slow),
    ],
)
def test_a_secret_in_a_setting_is_written_nowhere(
    corpus: Path, tmp_path: Path, secret: str, words: tuple[str, ...], environment: dict[str, str]
) -> None:
    words = (*words, "--config.train.steps=6", "--config.tracking.wandb=offline")
    for _ in range(2):  # the second finds it finished, by the same config
        result = train(corpus, tmp_path / "run", *words, **environment, WANDB_MODE="offline").done()
        assert secret not in result.out + result.err
    assert holding(tmp_path, secret) == []
    assert (tmp_path / "run" / "wandb").is_dir()


@pytest.mark.parametrize(
    "words",
    [
        (f"--api-key={CANARY}",),
        ("--hf-token", CANARY),
        (f"--config.tracking.api_key={CANARY}",),
        (f"--config.data.sources.my_secret.path={CANARY}",),
        (f"--config.train.steps={FORM}",),
        ("--config.train.steps=s3://user:" + CANARY + "@host",),
    ],
)
@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_a_secret_on_the_command_line_is_not_repeated(
    corpus: Path, tmp_path: Path, words: tuple[str, ...], debug: tuple[str, ...]
) -> None:
    result = train(corpus, tmp_path / "run", *words, *debug)
    assert result.code in (2, 3), result
    assert "canary-0123" not in result.err + result.out and FORM not in result.err + result.out
    assert result.last.startswith("lmjax: error: ")


def test_a_secret_is_not_in_the_traceback_of_a_bug(corpus: Path, tmp_path: Path) -> None:
    result = train(corpus, tmp_path / "run", LMJAX_FAULTS="raise@step:2", MY_SECRET="injected by LMJAX_FAULTS")
    assert result.code == 1 and "this is a bug" in result.last
    kept = Path(result.last.rpartition("traceback in ")[2].rstrip(")"))
    text = kept.read_text()
    kept.unlink()
    assert "Traceback" in text and "<redacted>" in text and "injected by LMJAX_FAULTS" not in text + result.err


# What is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.txt.gz"])
def test_a_line_that_unpacks_to_too_much_is_refused(tmp_path: Path, name: str) -> None:
    with gzip.open(tmp_path / name, "wb") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n')
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    words = ("prepare", tmp_path / name, f"--out={tmp_path / 'data'}", "--tokenizer=bytes", "--workers=1")
    lmjax(*words).refused(3, name, "document_bytes=134,217,728", "--document-bytes")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, 700_000)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_the_limit_is_one_of_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789||" * 50)
    words = ("prepare", tmp_path / "a.txt", "--tokenizer=bytes", "--workers=1")
    lmjax(*words, f"--out={tmp_path / 'x'}", "--document-bytes=599").refused(3, "a.txt: longer than")
    lmjax(*words, f"--out={tmp_path / 'x'}", "--document-bytes=600").done()
    parts = (*words, f"--out={tmp_path / 'y'}", "--document-separator=||")
    lmjax(*parts, "--document-bytes=9").refused(3, "a.txt, document 1: longer than")
    assert "50 documents" in lmjax(*parts, "--document-bytes=10").done().err


# Models from elsewhere ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("hf") / "run"
    llama = ("gated=True", "activation=silu")
    train(corpus, workdir, "--config.train.steps=6", *(f"--config.model.{setting}" for setting in llama)).done()
    lmjax("convert", "--to-hf", f"--workdir={workdir}", f"--out={workdir / 'model'}").done()
    return workdir / "model"


def convert(exported: Path, workdir: Path, *pins: str) -> Result:
    return lmjax("convert", f"--from-hf={exported}", f"--workdir={workdir}", *(f"--sha256={pin}" for pin in pins))


def test_a_pinned_model_is_that_one_or_none(exported: Path, tmp_path: Path) -> None:
    weights = exported / "model.safetensors"
    good = hashlib.sha256(weights.read_bytes()).hexdigest()
    described = hashlib.sha256((exported / "config.json").read_bytes()).hexdigest()
    convert(exported, tmp_path / "a", good).done()
    convert(exported, tmp_path / "b", f"model.safetensors={good.upper()}", f"config.json={described}").done()
    other = copied(exported, tmp_path / "other")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    refused: list[tuple[Any, tuple[str, ...], int, str]] = [
        (other, (good,), 4, "model.safetensors has the SHA-256"),
        (exported, (f"config.json={good}", f"model.safetensors={good}"), 4, "config.json has the SHA-256"),
        (exported, (f"config.json={described}",), 4, "model.safetensors has no --sha256"),
        (exported, (f"gone.json={described}", good), 4, "cannot read"),
        (exported, ("abc",), 2, "64 hexadecimal digits"),
    ]
    for directory, pins, code, said in refused:
        convert(directory, tmp_path / "c", *pins).refused(code, said)
        assert not (tmp_path / "c").exists()
