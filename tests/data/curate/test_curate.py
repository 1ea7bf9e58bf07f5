"""A curation: the same bytes however it was run, nothing of others touched, all of it accounted for."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest

from lmjax import config
from lmjax.__main__ import parse
from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.curate.curate import curate
from lmjax.data.curate.read import chunks
from lmjax.data.curate.recipe import STEPS, CurateConfig, parse_step
from lmjax.data.curate.result import Curation, read_curation
from lmjax.data.curate.stage import Stage, plan
from lmjax.data.curate.workers import Order, _Worker
from lmjax.data.prepare.prepare import prepare
from lmjax.data.store.dataset import open_dataset
from lmjax.data.tokenizers.alphabets import ByteTokenizer, CharacterTokenizer
from lmjax.errors import ConfigError, DataError
from lmjax.schema import validated

CONFIGS = Path(__file__).parents[3] / "configs" / "curate"

STEPS_WITHOUT_PACKAGES: tuple[dict[str, Any], ...] = (
    {"step": "normalize"},
    {"step": "privacy"},
    {"step": "gopher", "least_words": 40, "least_stop_words": 0},
    {"step": "held_out", "fraction": 0.1},
    {"step": "exact_duplicates"},
    {"step": "blocklist", "words": ("forbidden",)},
    {"step": "repeated_parts", "part": "line", "keep_first": False},
)

LICENCE = "This text is free for all to read and to give away."


@pytest.fixture
def corpus(tmp_path: Path, sentences: Callable[[int, int], str]) -> dict[str, tuple[str, ...]]:
    """Two sources: 60 texts, ten of them twice, and 20 with a licence, an address or a word of the blocklist."""
    texts = [sentences(12, n) for n in range(50)] + [sentences(12, n).upper() for n in range(10)]
    pages = [f"{sentences(6, 100 + n)}\n{LICENCE}\nWrite to me{n}@example.org  \n" for n in range(18)]
    pages += [sentences(9, 200) + " forbidden", "too short"]
    for name, found in (("books", texts), ("pages", pages)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return {name: (str(tmp_path / f"{name}.jsonl"),) for name in ("books", "pages")}


@pytest.fixture
def recipe(corpus: dict[str, tuple[str, ...]]) -> CurateConfig:
    return CurateConfig(sources=corpus, steps=STEPS_WITHOUT_PACKAGES, chunk_bytes=8000, shard_bytes=12_000, workers=1)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_becomes_of_a_corpus(recipe: CurateConfig, tmp_path: Path, sentences: Callable[[int, int], str]) -> None:
    curation = curate(recipe, tmp_path / "out", progress=False)
    names = ["read", *(step["step"] for step in STEPS_WITHOUT_PACKAGES)]
    assert [account.step for account in curation.steps] == names
    for before, after in zip(curation.steps, curation.steps[1:], strict=False):
        assert after.read == before.kept
        lost = [sum(count[part] for count in after.dropped.values()) for part in (0, 1)]
        assert after.read[0] - after.kept[0] == lost[0] and (after.changed or after.read[1] - after.kept[1] == lost[1])
        assert [sum(count[part] for count in after.sources.values()) for part in (0, 1)] == after.kept
        assert sum(after.lengths.values()) == after.kept[0]
    steps = {account.step: account for account in curation.steps}
    assert steps["read"].kept[0] == 80 and steps["gopher"].dropped["too few words"] == [1, 9]
    assert steps["privacy"].changed["an e-mail address"] == [18, 18]
    assert sum(count[0] for count in steps["exact_duplicates"].dropped.values()) == 10
    assert steps["exact_duplicates"].facts["cluster_sizes"] == {"2": 10}
    assert steps["repeated_parts"].changed["a repeated line"] == [18, 18]
    assert len(steps["privacy"].examples["an e-mail address"]) == 10
    assert "example.org" not in (tmp_path / "out" / "curation.json").read_text()
    assert sorted(files_of(tmp_path / "out")) == sorted(
        ["curation.html", "curation.json", *(shard.name for shard in curation.shards)]
    )
    assert sum(shard.documents for shard in curation.shards) == steps["repeated_parts"].kept[0] == 68
    assert steps["held_out"].found.keys() == {"train", "valid"}
    assert read_curation(tmp_path / "out") == curation  # type: ignore[arg-type]


@pytest.mark.parametrize("leave_out", [0, 4])  # with steps before the first pass, and without
def test_tokens_are_counted_where_the_recipe_names_a_tokenizer(
    recipe: CurateConfig, tmp_path: Path, leave_out: int
) -> None:
    """Of the texts as they are after each step: here a token is a byte."""
    steps = STEPS_WITHOUT_PACKAGES[leave_out:]
    plain = curate(dataclasses.replace(recipe, steps=steps), tmp_path / "plain", progress=False)
    ByteTokenizer().save(tmp_path / "tokenizer")
    counting = dataclasses.replace(recipe, steps=steps, tokenizer=str(tmp_path / "tokenizer"))
    curation = curate(counting, tmp_path / "counted", progress=False)
    assert [account.tokens for account in curation.steps[1:]] == [
        [account.read[1], account.kept[1]] for account in plain.steps[1:]
    ]
    assert curation.steps[0].tokens == [plain.steps[0].kept[1]] * 2 and plain.steps[0].tokens is None
    page = (tmp_path / "counted" / "curation.html").read_text()
    assert f"{plain.steps[-1].kept[1]:,}</td>" in page and "tokens</th>" in page
    assert f"{plain.steps[-1].kept[1]:,} tokens" in curation.lines()[-2]
    CharacterTokenizer({*"abc"}).save(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="the files of the sources, or of the steps, changed since"):
        curate(counting, tmp_path / "counted", progress=False)


def test_what_cannot_be_counted_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "abba"}\n{"text": "abbot"}\n')
    CharacterTokenizer({*"abc"}).save(tmp_path / "tokenizer")
    recipe = CurateConfig(sources={"s": (f"{tmp_path}/in.jsonl",)}, steps=(), tokenizer=f"{tmp_path}/tokenizer")
    with pytest.raises(DataError, match=r"^s/in\.jsonl, line 2: character 'o' is not in the tokenizer's alphabet"):
        curate(dataclasses.replace(recipe, workers=1), tmp_path / "out", progress=False)


def test_the_number_of_processes_changes_nothing(recipe: CurateConfig, tmp_path: Path) -> None:
    for workers in (1, 4):
        curate(dataclasses.replace(recipe, workers=workers), tmp_path / f"out{workers}", progress=False)
    assert files_of(tmp_path / "out1") == files_of(tmp_path / "out4")


CODE = (
    "import sys, pydantic; from lmjax.data.curate.recipe import CurateConfig\n"
    "from lmjax.data.curate.curate import curate\n"
    "curate(pydantic.TypeAdapter(CurateConfig).validate_json(sys.argv[1]), sys.argv[2], progress=False)"
)


@pytest.mark.parametrize("workers", [1, 4])
def test_killed_at_any_time_and_run_again_gives_the_same_bytes(
    recipe: CurateConfig, tmp_path: Path, workers: int
) -> None:
    """Though processes that have lost their parent may still be at work for a moment."""
    recipe = dataclasses.replace(recipe, workers=workers)
    curate(recipe, tmp_path / "whole", progress=False)
    target, done = tmp_path / "killed", []
    text = pydantic.TypeAdapter(CurateConfig).dump_json(recipe).decode()
    for wanted in (1, 4, 9, 14, 20):  # kill when so many chunks are done
        process = subprocess.Popen([sys.executable, "-c", CODE, text, str(target)])
        while process.poll() is None and len(list(target.glob("curating/*/*.json"))) < wanted:
            time.sleep(0.001)
        process.kill()
        process.wait()
        done.append(len(list(target.glob("curating/*/*.json"))))
        if (target / "curation.json").exists():
            break  # it was quicker than the kill
    assert done[:2] == sorted(done[:2]) and done[0] >= 1  # work that was done is kept
    curate(recipe, target, progress=False)
    assert files_of(target) == files_of(tmp_path / "whole")


def test_a_finished_curation_is_left_alone_and_another_one_refused(
    recipe: CurateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    curation = curate(recipe, target, progress=False)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    (target / "curating" / "0").mkdir(parents=True)  # as a kill at the very end would leave it
    assert curate(dataclasses.replace(recipe, workers=2), target, progress=False) == curation
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    steps = ({"step": "normalize", "unicode": "nfkc"}, *STEPS_WITHOUT_PACKAGES[1:])
    with pytest.raises(DataError, match=r"curated differently: steps\[0\] \(normalize\): unicode"):
        curate(dataclasses.replace(recipe, steps=steps), target)
    with pytest.raises(DataError, match="it had 7 steps, now 6"):
        curate(dataclasses.replace(recipe, steps=STEPS_WITHOUT_PACKAGES[:6]), target)
    with pytest.raises(DataError, match="chunk_bytes was 8000, now 5000"):
        curate(dataclasses.replace(recipe, chunk_bytes=5000), target)
    source = Path(recipe.sources["books"][0])
    moved = source.rename(tmp_path / "elsewhere").rename(tmp_path / "books.jsonl")
    assert curate(recipe, target, progress=False) == curation
    moved.write_text(moved.read_text() + '{"text": "more"}\n')
    with pytest.raises(DataError, match="the files of the sources, or of the steps, changed since"):
        curate(recipe, target)
    moved.unlink()  # it is needed no more
    assert curate(recipe, target, progress=True) == curation
    assert "was finished before, and its files are as they were written" in capsys.readouterr().err
    with pytest.raises(DataError, match="curated differently: it had 7 steps, now 6"):
        curate(dataclasses.replace(recipe, steps=STEPS_WITHOUT_PACKAGES[:6]), target)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "has lost train-00001.jsonl.zst"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
            "train-00001.jsonl.zst is not as it was curated",
        ),
        (lambda path: (path.parent / "train-00009.jsonl.zst").touch(), "holds train-00009.jsonl.zst, which its cur"),
    ],
)
def test_files_that_a_curation_has_lost_are_noticed(
    recipe: CurateConfig, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    """By whoever is to use it."""
    target = tmp_path / "out"
    curate(recipe, target, progress=False)
    verify = parse(["verify", str(target)])
    assert verify.function(verify) == 0
    spoil(target / "train-00001.jsonl.zst")
    with pytest.raises(DataError, match=message):
        curate(recipe, target, progress=False)
    with pytest.raises(DataError, match=message):
        verify.function(verify)
    cfg = PrepareConfig(inputs=(str(target),), tokenizer=TokenizerConfig(kind="bytes"), workers=1)
    with pytest.raises(DataError, match=message):
        prepare(cfg, tmp_path / "data", progress=False)
    assert not (tmp_path / "data").exists()


def test_files_that_are_edited_while_they_are_read_are_noticed(
    recipe: CurateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(recipe.sources["books"][0])

    def edited(*arguments: Any) -> Any:
        for number, chunk in enumerate(chunks(*arguments)):
            if number == 1:
                source.write_text(source.read_text().replace("a", "b"))
            yield chunk

    monkeypatch.setattr("lmjax.data.curate.curate.chunks", edited)
    with pytest.raises(DataError, match="changed while they were read; run it again"):
        curate(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert curate(recipe, tmp_path / "out", progress=False).shards


def test_a_beginning_is_not_finished_with_another_version_of_a_package(
    recipe: CurateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lmjax.data.curate.packages.versions", lambda steps: {"ftfy": "1.0"})
        patch.setattr("lmjax.data.curate.result.write_shards", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            curate(recipe, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match=r"half-made curation of another recipe: packages was \{'ftfy': '1.0'\}, now"):
        curate(recipe, tmp_path / "out", progress=False)
    curate(recipe, tmp_path / "fresh", progress=False)
    monkeypatch.setattr("lmjax.data.curate.packages.versions", lambda steps: {"ftfy": "2.0"})
    curate(recipe, tmp_path / "fresh", progress=False)  # what is finished needs none


def test_a_process_that_dies_is_told(recipe: CurateConfig, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"steps": []}))
    worker = _Worker(tmp_path)  # type: ignore[arg-type]
    worker._process.kill()
    worker._process.wait()
    worker.send(Order(1, 0, 0))
    with pytest.raises(DataError, match="a curating process died with exit code -9"):
        worker.receive()
    worker.stop()


def test_files_of_others_are_not_touched(recipe: CurateConfig, tmp_path: Path) -> None:
    for name in ("train-00000.jsonl.zst", "curation.html", "curating/notes"):
        target = tmp_path / name.replace("/", "-")
        (target / name).parent.mkdir(parents=True)
        (target / name).write_text("somebody's work")
        with pytest.raises(DataError, match=f"holds {name}, which no curate has made there"):
            curate(recipe, target, progress=False)
        assert (target / name).read_text() == "somebody's work"


def test_what_fails_at_once_leaves_nothing(recipe: CurateConfig, tmp_path: Path) -> None:
    Path(recipe.sources["pages"][0]).write_text("not JSON\n")
    with pytest.raises(DataError, match=r"pages/pages.jsonl, line 1 \(byte 0\): not JSON"):
        curate(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_nothing_left_is_said(recipe: CurateConfig, tmp_path: Path) -> None:
    steps = ({"step": "gopher", "least_words": 5000},)
    with pytest.raises(DataError, match="no document is left after gopher"):
        curate(dataclasses.replace(recipe, steps=steps), tmp_path / "out", progress=False)


def test_a_missing_package_is_named_before_a_document_is_read(
    recipe: CurateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(DataError, match=r"step repair needs ftfy .*install lmjax\[curate\]"):
        curate(dataclasses.replace(recipe, steps=({"step": "repair"},)), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_prepare_takes_a_curation_with_its_validation_documents(
    recipe: CurateConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    curation = curate(recipe, tmp_path / "out", progress=False)
    cfg = PrepareConfig(inputs=(str(tmp_path / "out"),), tokenizer=TokenizerConfig(kind="bytes"), workers=1)
    manifest = prepare(cfg, tmp_path / "data", progress=False)
    assert not caplog.records  # its record and its page are no text that somebody forgot
    for split in ("train", "valid"):
        shards = [shard for shard in curation.shards if shard.name.startswith(split)]
        assert manifest.splits[split].documents == sum(shard.documents for shard in shards)  # type: ignore[index]
        assert manifest.splits[split].text_bytes == sum(shard.text_bytes for shard in shards)  # type: ignore[index]
    assert manifest.curations == (curation.fingerprint,)
    assert open_dataset(tmp_path / "data").manifest.fingerprint == manifest.fingerprint
    assert dataclasses.replace(manifest, curations=()).fingerprint != manifest.fingerprint
    mixed = dataclasses.replace(cfg, inputs=(*cfg.inputs, recipe.sources["books"][0]))
    with pytest.raises(DataError, match=r"brings its own validation documents, .*books.jsonl does not"):
        prepare(mixed, tmp_path / "mixed", progress=False)


def test_the_same_documents_elsewhere_have_the_same_fingerprint(recipe: CurateConfig, tmp_path: Path) -> None:
    def curated(place: str) -> Curation:
        (tmp_path / place).mkdir()
        sources = {}
        for name, (path,) in recipe.sources.items():
            (tmp_path / place / f"{name}.jsonl").write_bytes(Path(path).read_bytes())
            sources[name] = (str(tmp_path / place / f"{name}.jsonl"),)
        return curate(dataclasses.replace(recipe, sources=sources), tmp_path / place / "out", progress=False)

    one, other = curated("one"), curated("two")
    assert one.fingerprint == other.fingerprint and one.recipe != other.recipe


def test_a_damaged_record_is_refused(recipe: CurateConfig, tmp_path: Path) -> None:
    curate(recipe, tmp_path / "out", progress=False)
    path = tmp_path / "out" / "curation.json"
    text = path.read_text()
    for damaged in (text[:-20], text.replace('"documents": ', '"documents": 1', 1), "[]", "{}"):
        path.write_text(damaged)
        with pytest.raises(DataError, match="is damaged"):
            read_curation(tmp_path / "out")  # type: ignore[arg-type]
        with pytest.raises(DataError, match="is damaged"):
            curate(recipe, tmp_path / "out")


def test_the_page_shows_every_reason_and_no_markup_of_documents(recipe: CurateConfig, tmp_path: Path) -> None:
    source = Path(recipe.sources["pages"][0])
    source.write_text(json.dumps({"text": "<script>alert(1)</script>"}) + "\n" + source.read_text())
    curation = curate(recipe, tmp_path / "out", progress=False)
    page = (tmp_path / "out" / "curation.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?:", page.split("</style>")[0])
    for account in curation.steps:
        for why in [*account.dropped, *account.changed]:
            assert why in page
    assert page.count("<details>") == sum(len({**account.dropped, **account.changed}) for account in curation.steps)
    for opened in ("table", "tr", "td", "th", "details", "pre", "div", "h2"):
        assert page.count(f"<{opened}") - page.count(f"<{opened}ead") == page.count(f"</{opened}>")


# Recipes --------------------------------------------------------------------------------------------------------------


def test_stages_are_cut_at_passes() -> None:
    names = ["normalize", "exact_duplicates", "privacy", "near_duplicates", "repeated_parts", "gopher"]
    steps = [parse_step(place, {"step": name}) for place, name in enumerate(names)]
    assert plan(steps) == [Stage(None, (0,), 1), Stage(1, (2,), 3), Stage(3, (), 4), Stage(4, (5,), None)]
    assert plan([]) == [Stage(None, (), None)]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (({"step": "gophr"},), r"steps\[0\]: there is no step 'gophr'; choose one of extract"),
        (({"name": "gopher"},), r"there is no step None"),
        (({"step": "gopher", "least_wrds": 5},), r"steps\[0\] gopher.least_wrds: "),
        (({"step": "near_duplicates", "threshold": 2},), r"steps\[0\] near_duplicates.threshold=2: "),
        (({"step": "exact_duplicates"}, {"step": "held_out"}), "held_out comes before exact_duplicates"),
    ],
)
def test_recipes_that_cannot_be_meant(steps: tuple[dict[str, Any], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validated(CurateConfig, {"sources": {"a": ("b",)}, "steps": steps}, "config.")


def test_no_sources_are_refused() -> None:
    with pytest.raises(ConfigError, match="sources is empty"):
        validated(CurateConfig, {"sources": {}, "steps": ()})


@pytest.mark.parametrize("name", STEPS)
def test_every_step_says_what_it_does(name: str) -> None:
    assert STEPS[name].__doc__ and STEPS[name].__doc__.rstrip().endswith(".")  # type: ignore[union-attr]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_the_recipes_that_are_there(
    path: Path, tmp_path: Path, corpus: dict[str, tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    tree = config.ConfigFile(f"{path}:{corpus['books'][0]}").tree().to_dict()
    cfg = validated(CurateConfig, tree)
    assert path.read_text().count("\nCommand     lmjax curate configs/curate/" + path.name) == 1
    if path.stem != "books":
        assert cfg.steps
        return
    for package in ("ftfy", "rensa"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    arguments = parse(["curate", f"{path}:{corpus['books'][0]}", f"--out={tmp_path}/out", "--workers=1"])
    assert arguments.function(arguments) == 0
    assert "curation.html shows what was dropped and why" in capsys.readouterr().out
