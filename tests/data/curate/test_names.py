"""Names are masked where a pipeline finds them; without one the step says what to install."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmjax.data.curate.curate import curate
from lmjax.data.curate.document import Changed, Document, Dropped
from lmjax.data.curate.names import Names
from lmjax.data.curate.recipe import STEPS, CurateConfig
from lmjax.data.tokenizers.sections import SECTION_CHARS
from lmjax.errors import DataError
from tests.data.curate.conftest import text_of

TEXT = "Yesterday Ada Lovelace met Grace Hopper in London;\n  nobody else came."


@dataclasses.dataclass
class Pipeline:
    """A pipeline, as far as the step reads it: three entities, of two kinds."""

    version: str = "1.0"

    @property
    def meta(self) -> dict[str, str]:
        return {"lang": "en", "name": "core_web_sm", "version": self.version}

    def __call__(self, text: str) -> Any:
        known = {"Ada Lovelace": "PERSON", "Grace Hopper": "PERSON", "London": "GPE"}
        places = ((text.find(name), name, kind) for name, kind in known.items() if name in text)
        entities = [SimpleNamespace(start_char=at, end_char=at + len(name), label_=kind) for at, name, kind in places]
        return SimpleNamespace(ents=sorted(entities, key=lambda entity: entity.start_char))


def install(version: str, patch: pytest.MonkeyPatch) -> None:
    """In place of spaCy: what is read of it."""
    patch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name, exclude: Pipeline(version)))  # type: ignore[arg-type]


@pytest.fixture(params=["spaCy", "what is read of it"])
def step(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    """With a pipeline of rules, of spaCy where it is installed."""
    if request.param == "spaCy":
        spacy = pytest.importorskip("spacy")
        rules = spacy.blank("en")
        known = {"Ada Lovelace": "PERSON", "Grace Hopper": "PERSON", "London": "GPE"}
        rules.add_pipe("entity_ruler").add_patterns([{"label": kind, "pattern": name} for name, kind in known.items()])
        rules.to_disk(tmp_path / "rules")
        return Names(pipeline=str(tmp_path / "rules"))
    install("1.0", monkeypatch)
    return Names()


def test_names_of_people_are_masked_and_nothing_else(step: Names) -> None:
    outcome = step.start({})(Document(TEXT, "s/1", "s"))
    assert isinstance(outcome, Changed) and outcome.what == ("a name", "a name")
    assert text_of(outcome) == "Yesterday <name> met <name> in London;\n  nobody else came."
    other = Document("Nobody came to London.", "s/1", "s")
    assert step.start({})(other) == other


def test_documents_with_names_are_dropped_if_one_wishes(step: Names) -> None:
    strict = Names(pipeline=step.pipeline, action="drop").start({})
    assert strict(Document(TEXT, "s/1", "s")) == Dropped("holds a name")


def test_long_documents_are_looked_at_in_parts(step: Names) -> None:
    long = ("nobody came\n" * (SECTION_CHARS // 6) + TEXT + "\n") * 2
    expected = long.replace("Ada Lovelace", "<name>").replace("Grace Hopper", "<name>")
    assert text_of(step.start({})(Document(long, "s/1", "s"))) == expected


def test_a_beginning_is_not_finished_with_another_version_of_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    recipe = CurateConfig(sources={"s": (f"{tmp_path}/a.txt",)}, steps=({"step": "names"},), workers=1)
    install("1.0", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("lmjax.data.curate.result.write_shards", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            curate(recipe, tmp_path / "out", progress=False)
    install("2.0", monkeypatch)
    with pytest.raises(DataError, match=r"packages was \{.*'en_core_web_sm': '1.0'\}, now .*'2.0'"):
        curate(recipe, tmp_path / "out", progress=False)
    install("1.0", monkeypatch)
    curation = curate(recipe, tmp_path / "out", progress=False)
    assert curation.steps[1].facts == {"pipeline": "en_core_web_sm 1.0"}


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("spacy") is not None:
        with pytest.raises(DataError, match="has no spaCy pipeline 'nowhere': install it"):
            Names(pipeline="nowhere").fit()
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(DataError, match=r"the step names needs spacy .*: install lmjax\[names\]"):
        STEPS["names"]().fit()  # type: ignore[union-attr]
