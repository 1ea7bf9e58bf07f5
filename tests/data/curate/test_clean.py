"""What is mended, and what is left as it is."""

import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmjax.data.curate.clean import ZWNJ, Extract, Normalize, Repair
from lmjax.data.curate.document import Document, Dropped
from tests.data.curate.conftest import text_of


def document(text: str) -> Document:
    return Document(text, "s/1", "s")


marks = st.text(st.sampled_from("ab كىي\u200c\u200b\ufeff\u00ad \t\n\r\x85\u2028é́ﬁ¨\ufe70ﷺ\u0654"), max_size=20)
joiners_and_forms = {
    "joiners": st.sampled_from(["keep", "tidy", "space"]),
    "form": st.sampled_from(["none", "nfc", "nfkc"]),
}


@given(text=marks, persian=st.booleans(), **joiners_and_forms)
@example(text="a\u200c\ufe70", persian=False, joiners="tidy", form="nfkc")  # which has a blank in this form
def test_normal_text_is_normal(text: str, persian: bool, joiners: str, form: str) -> None:
    """To normalize twice changes nothing more, whatever the marks, and says so."""
    step = Normalize(persian=persian, joiners=joiners, unicode=form)
    once = step.apply(text)
    assert step.apply(once) == once
    assert not set(once) & set("\u200b\ufeff\u00ad\r\x85\u2028") and "\n\n\n" not in once
    assert not any(line != line.rstrip() for line in once.split("\n"))
    assert not persian or not set(once) & set("كىي")
    assert ZWNJ not in once or joiners != "space"


@given(text=st.text())
def test_nothing_else_is_touched(text: str) -> None:
    step = Normalize(unicode="none", whitespace=False, invisible=False)
    assert step.apply(text) == text
    assert Normalize(whitespace=False, invisible=False).apply(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("joiners", "text", "expected"),
    [
        ("keep", f"می{ZWNJ}{ZWNJ}رود {ZWNJ}و", f"می{ZWNJ}{ZWNJ}رود {ZWNJ}و"),
        ("tidy", f"{ZWNJ}می{ZWNJ}{ZWNJ}رود {ZWNJ}و{ZWNJ}", f"می{ZWNJ}رود و"),
        ("space", f"می{ZWNJ}رود", "می رود"),
    ],
)
def test_joiners_are_treated_as_one_wishes(joiners: str, text: str, expected: str) -> None:
    assert Normalize(joiners=joiners).apply(text) == expected


def test_the_poets_keep_their_joiners(persian: list[str]) -> None:
    """Their plurals and verbs are joined here, as is usual today; idle joiners and Arabic letters are planted."""
    step = Normalize(persian=True, joiners="tidy")
    for text in persian:
        joined = re.sub(r"(?<=\w) (?=ها\b)|(?<=\bمی) (?=\w)", ZWNJ, text)
        assert joined.count(ZWNJ) > 20 and not set(text) & set("يك\u200c")
        typed = joined.replace("\n", f"{ZWNJ}\n").translate(str.maketrans({"ی": "ي", "ک": "ك"}))
        cleaned = step.apply(typed)
        assert cleaned.split() == unicodedata.normalize("NFC", joined).split()


def test_mojibake_is_undone_and_other_text_left_as_it_is() -> None:
    pytest.importorskip("ftfy")
    repair = Repair().start({})
    good = "“Quoted” — naïve café, ﬁne\x1b[0m &amp; 日本 …\r\n"
    assert repair(document(good)) == document(good)
    for codec in ("latin-1", "cp1252"):
        text = "Ein schöner Tag für Größe, naïve café déjà vu"
        assert text_of(repair(document(text.encode().decode(codec)))) == text


def test_persian_is_no_mojibake(persian: list[str]) -> None:
    pytest.importorskip("ftfy")
    repair = Repair().start({})
    for text in persian:
        assert text_of(repair(document(text))) == text


def test_pages_lose_what_is_around_their_text() -> None:
    pytest.importorskip("trafilatura", exc_type=ImportError)
    extract = Extract().start({})
    story = "The ship left the harbour at dawn, and nobody on the quay said a word about the storm that was to come. "
    page = (
        "<!DOCTYPE html><html><head><title>x</title><style>p {}</style></head><body><nav><a href='/'>Home</a>"
        f"<a href='/b'>Shop</a></nav><article><h1>A storm</h1><p>{story * 3}</p><p>{story * 2}</p></article>"
        "<footer>Copyright, all rights reserved</footer><script>var a = 1;</script></body></html>"
    )
    text = text_of(extract(document(page)))
    assert text is not None and text.count("harbour at dawn") == 5
    assert not any(mark in text for mark in ("<", "Home", "rights reserved", "var a"))
    assert extract(document(story)) == document(story)
    assert isinstance(extract(document("<html><body></body></html>")), Dropped)
