"""Languages are told apart, and verse is a language, too."""

import pytest

from lmjax.data.curate.document import Changed, Document, Dropped
from lmjax.data.curate.language import Language, sample
from lmjax.data.curate.step import DocumentStep

TEXTS = {
    "en": "The ship left the harbour at dawn, and nobody on the quay said a word about the storm that was to come.",
    "de": "Das Schiff verließ den Hafen im Morgengrauen, und niemand am Kai sprach von dem Sturm, der kommen sollte.",
    "fr": "Le navire quitta le port à l'aube, et personne sur le quai ne parla de la tempête qui allait venir.",
    "fa": "کشتی در سپیده‌دم بندر را ترک کرد و هیچ‌کس در اسکله از توفانی که در راه بود سخنی نگفت.",
}


@pytest.fixture(scope="module")
def packages() -> None:
    pytest.importorskip("py3langid")


def test_languages_are_told_apart_and_counted(packages: None) -> None:
    identify = Language(keep=("en", "fa")).start({})
    for language, text in TEXTS.items():
        outcome = identify(Document(text, "s/1", "s"))
        assert outcome.found == (language,)  # type: ignore[union-attr]
        if language in ("en", "fa"):
            assert isinstance(outcome, Changed) and outcome.document.labels == {"language": language}
        else:
            assert outcome == Dropped("in another language", (language,))
    every = Language(least=0.0).start({})
    assert all(isinstance(every(Document(text, "s/1", "s")), Changed) for text in [*TEXTS.values(), "12345 !?"])
    unsure = Language(least=0.9).start({})
    assert isinstance(unsure(Document("12345 !?", "s/1", "s")), Dropped)


def test_verse_is_kept(packages: None, persian: list[str]) -> None:
    """Passages of 20 lines of five classical poets."""
    identify = Language(keep=("fa",)).start({})
    lines = [line for text in persian for line in text.splitlines()[2:802]]
    passages = ["\n".join(lines[start : start + 20]) for start in range(0, len(lines), 20)]
    kept = [isinstance(identify(Document(passage, "s/1", "s")), Changed) for passage in passages]
    assert len(kept) == 200 and sum(kept) >= 0.97 * len(kept)


def test_a_sample_is_of_beginning_middle_and_end() -> None:
    assert sample("abc", 3) == "abc"
    assert sample("aaabbbbccc", 6) == "aa\nbb\ncc"
    assert isinstance(Language(), DocumentStep)
