"""What tells of one person: addresses, telephone and card numbers. And words that one does not want at all."""

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.step import Arrays, DocumentStep
from lmjax.data.prepare.sources import list_inputs
from lmjax.errors import DataError
from lmjax.record.files import read_bytes
from lmjax.schema import PositiveInt, config_class

Treatment = Literal["mask", "drop", "keep"]


class Match(NamedTuple):
    """A private passage of a text."""

    start: int
    end: int
    kind: str


@config_class
class Privacy(DocumentStep):
    """E-mail addresses, public IP addresses, telephone and card numbers: each masked, or a reason to drop a document.

    A mask, such as `<email>`, takes the place of the passage, and no other character changes.
    """

    emails: Treatment = "mask"
    ips: Treatment = "mask"
    """Addresses of version 4 and 6 that are routed on the internet; 127.0.0.1 or 192.168.1.1 belong to nobody."""
    phones: Treatment = "mask"
    """Numbers written with a country code (+44 20 7946 0958) or as in North America ((212) 555-0123)."""
    cards: Treatment = "mask"
    """13 to 19 digits that begin as cards do and whose last one is right (Luhn; ISO/IEC 7812)."""

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        return self.apply

    def apply(self, document: Document) -> Outcome:
        """The document with masks."""
        treatments: dict[str, Treatment] = {
            "email": self.emails, "ip": self.ips, "phone": self.phones, "card": self.cards
        }  # fmt: skip
        matches = [match for match in find(document.text) if treatments[match.kind] != "keep"]
        for match in matches:
            if treatments[match.kind] == "drop":
                return Dropped(f"holds {_NAMES[match.kind]}")
        if not matches:
            return document
        return Changed(
            document._replace(text=masked(document.text, matches)), tuple(_NAMES[match.kind] for match in matches)
        )


_NAMES = {"email": "an e-mail address", "ip": "an IP address", "phone": "a telephone number", "card": "a card number"}


def mask(text: str) -> str:
    """The text with a mask for everything private."""
    return masked(text, find(text))


def masked(text: str, matches: Sequence[Match]) -> str:
    """The text with `<kind>` in place of each passage, and no other character changed."""
    parts, end = [], 0
    for match in matches:
        parts += [text[end : match.start], f"<{match.kind}>"]
        end = match.end
    return "".join([*parts, text[end:]])


def find(text: str) -> list[Match]:
    """The private passages in their order; of those that overlap the one that begins first, then the longest."""
    candidates = sorted(
        (match for search in _SEARCHES for match in search(text)), key=lambda found: (found.start, -found.end)
    )
    kept: list[Match] = []
    for match in candidates:
        if not kept or match.start >= kept[-1].end:
            kept.append(match)
    return kept


def _emails(text: str) -> Iterator[Match]:
    if "@" in text:
        yield from (Match(*found.span(), "email") for found in _EMAIL.finditer(text))


def _ips(text: str) -> Iterator[Match]:
    for pattern in (_IPV4, _IPV6):
        for found in pattern.finditer(text):
            try:
                if ipaddress.ip_address(found[0]).is_global:
                    yield Match(*found.span(), "ip")
            except ValueError:
                continue


def _phones(text: str) -> Iterator[Match]:
    yield from (Match(*found.span(), "phone") for found in _PHONE.finditer(text))


def _cards(text: str) -> Iterator[Match]:
    for found in _CARD.finditer(text):
        if is_card(re.sub(r"\D", "", found[0])):
            yield Match(*found.span(), "card")


def is_card(digits: str) -> bool:
    """Whether the digits begin as those of cards do and pass Luhn's check (ISO/IEC 7812-1, annex B)."""
    if not 13 <= len(digits) <= 19 or digits[0] not in "3456":
        return False
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0


_SEARCHES = (_emails, _ips, _phones, _cards)
_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9][\w.+%-]{0,63}(?<!\.)@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b",
    re.ASCII,
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])", re.ASCII)
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+[1-9]\d{0,2}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]?\d{2,5}){2,5}"  # with a country code
    r"|(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[.-]\d{4}"  # North America
    r")(?![\w-]|\.\d)",
    re.ASCII,
)
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)", re.ASCII)


@config_class
class Blocklist(DocumentStep):
    """Drop documents with words of a list: one of one's own, since what is unwanted depends on the purpose."""

    words: tuple[str, ...] = ()
    file: str | None = None
    """More of them: a text file with a word or a phrase a line."""
    least: PositiveInt = 1
    """How many of them, each as often as it occurs, it takes."""

    def inputs(self) -> tuple[str, ...]:
        return () if self.file is None else (self.file,)

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        pattern = self._pattern()

        def check(document: Document) -> Outcome:
            found = [match[0].lower() for match in pattern.finditer(document.text)]
            return Dropped("holds words of the blocklist", tuple(found)) if len(found) >= self.least else document

        return check

    def _pattern(self) -> re.Pattern[str]:
        listed = [*self.words]
        for file in list_inputs(self.inputs()):
            listed += read_bytes(file.path).decode("utf-8", "replace").splitlines()
        phrases = sorted({phrase.strip() for phrase in listed if phrase.strip()}, key=lambda one: (-len(one), one))
        if not phrases:
            raise DataError("the step blocklist has no words: give words, or a file with one a line")
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, phrases))})(?!\w)", re.IGNORECASE)
