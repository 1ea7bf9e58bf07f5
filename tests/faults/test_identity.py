"""Whose a file is, and of which format: nothing of another run, of a later lmjax or of no lmjax is taken for one's own,
and what earlier ones wrote is read."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.black_box import ENVIRONMENT, ROOT, copied, few, hashes, ledger, lmjax, train

FIXTURES = ROOT / "tests" / "fixtures"
SEAL = "LMJAX_MANIFEST.json"
Document = dict[str, Any]


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    """The run as it was after step 8."""
    workdir = copied(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "12")
    (workdir / "summary.json").unlink()
    return workdir


def canonical(document: Any) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def reseal(step: Path, change: Callable[[Document], Any]) -> None:
    """What a later version, a bug or a hostile hand could have sealed."""
    document = json.loads((step / SEAL).read_text())
    del document["self"]
    document = change(document) or document
    digest = hashlib.blake2b(canonical(document).encode(), digest_size=16).hexdigest()
    (step / SEAL).write_text(canonical(document | {"self": digest}))


# Other runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(corpus: Path) -> Path:
    """A run of the same shapes."""
    train(corpus, corpus / "other", "--config.train.seed=1").done()
    return corpus / "other"


def test_a_checkpoint_of_another_run_is_refused(corpus: Path, whole: Path, other: Path, cut: Path) -> None:
    copied(other / "checkpoints" / "12", cut / "checkpoints" / "12")
    for command in (
        ["train", f"--config={ROOT}/tests/faults/tiny.py:{corpus}", f"--workdir={cut}"],
        ["evaluate", f"--workdir={cut}"],
        ["verify", cut],
    ):
        lmjax(*command).refused(4, "12", "another run")
    shutil.rmtree(cut / "checkpoints" / "12")
    train(corpus, cut).done()
    assert hashes(cut) == hashes(whole) and ledger(cut)[-4:] == ledger(whole)[-4:]


def test_a_finished_run_does_not_hide_a_checkpoint_of_another(corpus: Path, whole: Path, other: Path, tmp_path: Path):
    workdir = copied(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "12")
    copied(other / "checkpoints" / "12", workdir / "checkpoints" / "12")
    train(corpus, workdir).refused(4, "another run")


def test_checkpoints_alone_are_of_the_config_that_saved_them(corpus: Path, whole: Path, cut: Path, tmp_path: Path):
    copied(cut / "checkpoints", tmp_path / "moved" / "checkpoints")
    train(corpus, tmp_path / "moved", "--config.train.seed=1").refused(2, "another config", "--allow-config-change")
    train(corpus, tmp_path / "moved").done()
    assert hashes(tmp_path / "moved") == hashes(whole)


def test_a_step_under_the_name_of_another_is_set_aside(corpus: Path, whole: Path, cut: Path) -> None:
    copied(cut / "checkpoints" / "8", cut / "checkpoints" / "11")
    assert "step 8, under the name of another" in train(corpus, cut).done().err
    assert hashes(cut) == hashes(whole)


# Later and odd formats ------------------------------------------------------------------------------------------------

LATER = {"format": 2, "version": "9.9"}


def stamped(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "lmjax": LATER}))


def stamped_line(path: Path) -> None:
    first, _, rest = path.read_text().partition("\n")
    path.write_text(json.dumps({**json.loads(first), "lmjax": LATER}) + "\n" + rest)


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("config.json", stamped, 2),
        ("metrics.jsonl", stamped_line, 4),
        ("ledger.jsonl", stamped_line, 4),
        (f"checkpoints/8/{SEAL}", lambda path: reseal(path.parent, lambda it: it | {"version": 2, "lmjax": "9.9"}), 4),
    ],
)
def test_what_a_later_lmjax_wrote_is_refused_by_name(
    corpus: Path, cut: Path, name: str, change: Callable[[Path], None], code: int
) -> None:
    change(cut / name)
    before = {path for path in cut.rglob("*") if path.name != ".lock"}
    train(corpus, cut).refused(code, name, "written by lmjax 9.9 in format 2, this is lmjax ", "formats 1 to 1")
    assert {path for path in cut.rglob("*") if path.name != ".lock"} == before


def test_a_summary_of_a_later_lmjax_is_refused_by_name(corpus: Path, whole: Path, tmp_path: Path) -> None:
    stamped(copied(whole, tmp_path / "run") / "summary.json")
    train(corpus, tmp_path / "run").refused(4, "summary.json", "written by lmjax 9.9 in format 2")


def test_data_of_a_later_lmjax_are_refused_by_name(corpus: Path, whole: Path, tmp_path: Path) -> None:
    data = copied(corpus / "a.prepared", tmp_path / "data")
    stamped(data / "tokenizer" / "tokenizer.description.json")
    lmjax("verify", data).refused(3, "tokenizer.description.json", "written by lmjax 9.9 in format 2")
    content = json.loads((data / "manifest.json").read_text()) | {"format": 2}
    content["recipe"]["lmjax"] = "9.9"
    del content["seal"]
    seal = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=32).hexdigest()
    (data / "manifest.json").write_text(json.dumps(content | {"seal": seal}))
    lmjax("verify", data).refused(3, "manifest.json", "written by lmjax 9.9 in format 2")


ODD: list[Callable[[Document], Any]] = [
    lambda it: {"version": 1},
    lambda it: it.pop("meta"),
    lambda it: it.update(meta=[]),
    lambda it: it.update(step="8"),
    lambda it: it.update(step=-8),
    lambda it: it.update(value="low"),
    lambda it: it.update(leaves=[]),
    lambda it: it["leaves"].update({"params/embed": [[-3], "float32"]}),
    lambda it: it["leaves"].update({"params/embed": [[3], "float33"]}),
    lambda it: it["leaves"].update({"params/embed": "float32"}),
    lambda it: it.update(files={}),
    lambda it: it.update(files=None),
    lambda it: it["files"].update({"../../config.json": ["0" * 32, 3]}),
    lambda it: it["files"].update({"state/_METADATA": 7}),
    lambda it: it.update(version="1"),
    lambda it: it.update(version=0),
    lambda it: it.update(version=None),
]


@pytest.mark.parametrize("change", ODD, ids=range(len(ODD)))
def test_an_odd_manifest_is_damage_even_if_it_is_sealed(cut: Path, change: Callable[[Document], Any]) -> None:
    def changed(document: Document) -> Document:
        made = change(document)
        return made if isinstance(made, dict) and "version" in made else document

    reseal(cut / "checkpoints" / "8", changed)
    for command in ("verify", "inspect"):
        lmjax(command, cut).refused(4, "8")


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.pop("data"),
        lambda meta: meta["data"].pop("origin"),
        lambda meta: meta["data"].update(next_sample=-1),
        lambda meta: meta["data"].update(sources=[]),
        lambda meta: meta.update(counts={"samples": 3}),
        lambda meta: meta.update(epochs={"a": "many"}),
        lambda meta: meta.update(tokens="many"),
    ],
    ids=range(7),
)
def test_odd_notes_of_a_run_are_refused(corpus: Path, cut: Path, change: Callable[[Document], Any]) -> None:
    reseal(cut / "checkpoints" / "8", lambda it: change(it["meta"]) and None)
    train(corpus, cut).refused(4, "checkpoint", "use another step")


# Earlier formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", few(sorted(path.name for path in FIXTURES.iterdir()), ["unstamped"]))
def test_what_earlier_versions_wrote_is_read(tmp_path: Path, name: str) -> None:
    """A run goes on where it was, its data are those of its recipe, a sweep says how it stands."""
    place = copied(FIXTURES / name, tmp_path / name)
    for path in ("data", "run"):
        lmjax("verify", place / path).done()
    before = (place / "data" / "manifest.json").read_bytes()
    words = (f"--config={ROOT}/tests/faults/frozen.py", "--workdir=run")
    ended = lmjax("train", *words, cwd=place).done()
    assert "resuming run from step 8" in ended.out
    assert (place / "data" / "manifest.json").read_bytes() == before
    assert [step for step, *_ in ledger(place / "run")] == list(range(1, 13))
    lmjax("verify", place / "run").done()
    assert '"loss": 2.3' in lmjax("evaluate", "--workdir=run", "--json", cwd=place).done().out
    command = [sys.executable, "-m", "launch", "status", str(place / "sweep")]
    status = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert "1 of 2 done" in status.stdout
