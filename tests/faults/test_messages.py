"""What is said: one short line that names what and where, in which nothing acts on a terminal."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from tests.faults.black_box import copied, lmjax, train

LONG = "x" * 10_000


def config_file(directory: Path, top: str, inside: str) -> Path:
    path = directory / "mine.py"
    path.write_text(
        f"import os, sys\nfrom lmjax.config import default_config\n{top}\n"
        f"def get_config():\n    {inside}\n    return default_config()\n"
    )
    return path


@pytest.mark.parametrize("call", ["exit(0)", "sys.exit()", "sys.exit('done')", "raise GeneratorExit"])
@pytest.mark.parametrize("where", ["top", "inside"])
def test_a_config_file_that_exits_is_no_success(tmp_path: Path, call: str, where: str) -> None:
    path = config_file(tmp_path, *((call, "pass") if where == "top" else ("", call)))
    lmjax("train", f"--config={path}", f"--workdir={tmp_path / 'run'}").refused(2, str(path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["train.epochs", "model.moe.exprets", "extra"])
def test_a_saved_config_of_another_version_names_itself(corpus: Path, whole: Path, tmp_path: Path, key: str) -> None:
    workdir = copied(whole, tmp_path / "run")
    tree = json.loads((workdir / "config.json").read_text())
    assert tree["lmjax"]["format"] == 1
    tree["lmjax"]["version"] = "0.0.9"
    *parents, name = key.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    node[name] = 3
    (workdir / "config.json").write_text(json.dumps(tree))
    said = (str(workdir / "config.json"), key, "written by lmjax 0.0.9, this is ")
    train(corpus, workdir).refused(2, *said)
    lmjax("evaluate", f"--workdir={workdir}").refused(2, *said)


@pytest.mark.parametrize(
    "words",
    [
        [f"--config.{LONG}=1"],
        [f"--config.train.{LONG}=1"],
        [f"--config.train.steps={LONG}"],
        [f"--config.train.steps={'many words ' * 1000}"],
        [f"--config.train.seed={'9' * 4000}"],
        [f"--config.optimizer.name={LONG}"],
        [f"--config.data.sources={LONG}"],
        [f"--config.data.sources.{LONG}.path=3"],
        [f"--config.data.sources.a.path={LONG}"],
        [f"--config.train.init_from={LONG}"],
        [f"--config.train.sample.prompts=('{LONG}',"],
        [f"--{LONG}"],
        [LONG],
        [f"--profile={LONG}"],
        [f"--workdir=/tmp/{LONG}"],
        [f"--config=/tmp/{LONG}.py"],
    ],
    ids=range(16),
)
def test_long_keys_and_values_make_short_messages(corpus: Path, whole: Path, tmp_path: Path, words: list[str]) -> None:
    ended = train(corpus, tmp_path / "run", *words)
    assert ended.code in (2, 3, 4), ended
    ended.refused(ended.code)
    assert len(ended.err.splitlines()) <= 4 and len(ended.err) < 1200


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["trian"], 2, "there is no command 'trian'; did you mean 'train'?"),
        (["x" * 9999], 2, "there is no command 'xxxx"),
        (["evaluate", "--workdir=gone"], 2, "gone is no work directory: it has no config.json"),
        (["prepare", "stdlib:", "--out=gone", "--tokenizer=bytes", "--vocab=300"], 2, "this tokenizer has its own"),
        (["tokenizer", ".", "text"], 3, "neither tokenizer.model nor tokenizer.json; did you mean "),
    ],
)
def test_what_is_meant_is_named(tmp_path: Path, words: list[str], code: int, said: str) -> None:
    (tmp_path / "tokenizer").mkdir()
    lmjax(*words, cwd=tmp_path).refused(code, said)
    assert not (tmp_path / "gone").exists()


def test_the_version_is_told() -> None:
    assert lmjax("--version").done().out == f"lmjax {importlib.metadata.version('lmjax')}\n"


def test_terminal_escapes_in_names_of_files_are_visible(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a\x1b[2J\x07\u202eb.txt").write_bytes(b"\xff")
    ended = lmjax("prepare", f"{text}/*.txt", f"--out={tmp_path}/out", "--tokenizer=bytes")
    ended.refused(3, r"a\x1b[2J\x07\u202eb.txt", "invalid UTF-8")
    assert not {"\x1b", "\x07", "\u202e"} & set(ended.out + ended.err)
    ended = lmjax("verify", tmp_path / "gone\x1b[31m\r\x9b")
    ended.refused(4, r"gone\x1b[31m")
    assert "\x1b" not in ended.err and "\x9b" not in ended.err


def test_terminal_escapes_in_text_are_visible(corpus: Path, whole: Path, tmp_path: Path) -> None:
    workdir = copied(whole, tmp_path / "run")
    for words in (["--tokens=4"], ["--tokens=4", "--prompt=b"]):
        ended = lmjax("generate", f"--workdir={workdir}", "--prompt=a\x1b]0;title\x07", *words).done()
        assert r"a\x1b]0;title\x07" in ended.out and not {"\x1b", "\x07"} & set(ended.out)
    (workdir / "summary.json").unlink()
    prompts = r"--config.train.sample.prompts=('a\x1b[2Jb',)"
    ended = train(corpus, workdir, prompts, "--config.train.sample.tokens=4").done()
    assert r"a\x1b[2Jb" in ended.out and "\x1b" not in ended.out
    assert "\x1b" not in (workdir / "report.md").read_text()


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("kill@setp:3", "did you mean 'step'?"),
        ("kill@checkpoint.write_all:1", "did you mean 'checkpoint.write'?"),
        ("kill@step:3,nan_grad@step:3", "kill and nan_grad at step:3; only one can be"),
        ("nan_grad@checkpoint.write:1", "nan_grad is for a step"),
        ("explode@step:3", "not what@site:n"),
    ],
)
def test_a_fault_that_could_not_happen_is_refused_at_once(corpus: Path, whole: Path, plan: str, said: str) -> None:
    train(corpus, whole, LMJAX_FAULTS=plan).refused(2, "LMJAX_FAULTS", said)
