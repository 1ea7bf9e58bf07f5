"""Masks take the place of what is private, and of nothing else."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.data.curate.document import Changed, Document, Dropped
from lmjax.data.curate.privacy import Blocklist, Privacy, find, is_card
from lmjax.errors import DataError

PRIVATE = {
    "email": ["joe.bloggs+x@mail.example.co.uk", "a@b.io", "X_1%y@sub-domain.museum"],
    "ip": ["8.8.8.8", "151.101.1.69", "2001:4860:4860::8888", "2606:2800:220:1:248:1893:25c8:1946"],
    "phone": ["+44 20 7946 0958", "+1-212-555-0123", "(212) 555-0123", "212-555-0123", "+49 (30) 901820 12"],
    "card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "6011111111111117"],
}  # fmt: skip
PLAIN = [
    "at 10.0.0.1 or 192.168.1.1 or 127.0.0.1 or ::1",  # of nobody
    "version 1.2.3.4.5 and 300.1.2.3, section 8.8.8.8.8",
    "in 1812-1815 and 2026-11-30, at 12:30:45, pages 100-200, +5 and +1000",
    "ISBN 978-3-16-148410-0, 4111 1111 1111 1112, 1234567890123456",
    "a@b, @handle, me@localhost, x @ y.com, file@2x.png1",
    "12,345,678.90 or 3.14159265358979 or 0x1F600",
]


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in PRIVATE.items() for value in values])
def test_what_is_private_is_found(kind: str, value: str) -> None:
    for text in (value, f"Write to {value}, or not.", f"({value})", f"x: {value}\n", f"<{value}>."):
        assert [(match.kind, text[match.start : match.end]) for match in find(text)] == [(kind, value)]


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_not_private_stays(text: str) -> None:
    assert find(text) == []


values = st.sampled_from([(kind, value) for kind, values in PRIVATE.items() for value in values])
plain = st.text(st.sampled_from("ab c,;!?\né漢ی\u200c"), max_size=12)


@given(parts=st.lists(st.tuples(plain, values), max_size=5), end=plain)
def test_masks_change_nothing_else(parts: list[tuple[str, tuple[str, str]]], end: str) -> None:
    text = "".join(f"{before} ; {value} ; " for before, (_, value) in parts) + end
    expected = "".join(f"{before} ; <{kind}> ; " for before, (kind, _) in parts) + end
    outcome = Privacy().apply(Document(text, "s/1", "s"))
    if parts:
        assert isinstance(outcome, Changed) and outcome.document.text == expected and len(outcome.what) == len(parts)
    else:
        assert outcome == Document(text, "s/1", "s")


@given(text=st.text())
def test_whatever_is_written_between_masks_it_was_there(text: str) -> None:
    matches = find(text)
    assert all(first.end <= second.start for first, second in itertools.pairwise(matches))


def test_each_kind_is_treated_as_one_wishes() -> None:
    document = Document("a@b.io and 8.8.8.8", "s/1", "s")
    assert Privacy(emails="drop").apply(document) == Dropped("holds an e-mail address")
    kept = Privacy(emails="keep").apply(document)
    assert isinstance(kept, Changed) and kept.document.text == "a@b.io and <ip>"


@given(digits=st.text("0123456789", min_size=12, max_size=18), first=st.sampled_from("3456"))
def test_one_digit_in_ten_ends_a_card(digits: str, first: str) -> None:
    """And a digit that is wrong anywhere is noticed, which is what the check is for."""
    number = first + digits[1:]
    (right,) = [last for last in "0123456789" if is_card(number + last)] if len(number) >= 12 else ("",)
    wrong = number[:5] + str((int(number[5]) + 1) % 10) + number[6:]
    assert not is_card(wrong + right)


def test_words_of_the_list_are_whole_words() -> None:
    check = Blocklist(words=("bad", "very wrong", "زشت"), least=2).start({})
    for text in ("a Bad day, bad", "VERY WRONG and bad", "زشت و bad"):
        outcome = check(Document(text, "s/1", "s"))
        assert isinstance(outcome, Dropped) and len(outcome.found) == 2
    for text in ("a bad day", "badly, badge, very  wrong", "زشتی bad"):
        assert check(Document(text, "s/1", "s")).text == text  # type: ignore[union-attr]
    with pytest.raises(DataError, match="no words"):
        Blocklist().start({})
