"""Rules for pages of the web: C4's and FineWeb's.

C4: Raffel et al., Exploring the Limits of Transfer Learning (arXiv:1910.10683), section 2.2. FineWeb: Penedo et al.,
The FineWeb Datasets (arXiv:2406.17557), its custom filters.
"""

import re
from collections.abc import Callable

from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.quality_rules import duplicated
from lmjax.data.curate.step import Arrays, DocumentStep
from lmjax.schema import Fraction, NonNegativeInt, config_class


@config_class
class C4(DocumentStep):
    """C4's rules: lines that are no sentences go, and so do pages with few sentences, code or filler."""

    end_in_punctuation: bool = True
    """Keep lines that end in a terminal punctuation mark alone."""
    least_words: NonNegativeInt = 5
    """Of a line."""
    least_sentences: NonNegativeInt = 3
    """Of a page, in the lines that are kept."""
    drop_braces: bool = True
    """Drop pages with a curly bracket, which are programs."""

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        return self.apply

    def apply(self, document: Document) -> Outcome:
        """The page with the lines that are sentences."""
        text = document.text
        if "lorem ipsum" in text.lower():
            return Dropped("lorem ipsum")
        if self.drop_braces and "{" in text:
            return Dropped("curly brackets")
        lines = text.splitlines()
        uncited = [_CITATION.sub("", line) for line in lines]
        kept = [line for line in uncited if not self._fault(line)]
        joined = "\n".join(kept)
        if len(_SENTENCE_END.findall(joined)) < self.least_sentences:
            return Dropped("too few sentences")
        if kept == lines:
            return document
        faults = tuple(fault for fault in map(self._fault, uncited) if fault)
        return Changed(document._replace(text=joined), faults or ("citation marks",))

    def _fault(self, line: str) -> str:
        line = line.strip()
        lowered = line.lower()
        if self.end_in_punctuation and (not line.endswith(_TERMINAL) or line.endswith("...")):
            return "a line without a terminal mark"
        if len(line.split()) < self.least_words:
            return "a short line"
        if "javascript" in lowered:
            return "a line about JavaScript"
        if any(policy in lowered for policy in _POLICIES):
            return "a line about policies"
        return ""


_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]", re.IGNORECASE)
_TERMINAL = (".", "!", "?", '"', "'", "”", "’", "»", "؟", "۔", "。", "！", "？", "」")
_SENTENCE_END = re.compile(r"[.!?؟۔。！？]+[\"'”’)]*(?=\s|\Z)")
_POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


@config_class
class FineWeb(DocumentStep):
    """FineWeb's three rules about the lines of a page."""

    least_punctuated: Fraction = 0.12
    """Drop pages where at most this share of the lines ends in punctuation."""
    most_duplicated: Fraction = 0.1
    """Drop pages with at least this share of the characters in lines that were there before."""
    most_short: Fraction = 0.67
    """Drop pages where at least this share of the lines has fewer than 30 characters."""

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        return self.apply

    def apply(self, document: Document) -> Outcome:
        """The page as it is, or dropped."""
        lines = [line.strip() for line in document.text.splitlines() if line.strip()]
        if not lines:
            return Dropped("no lines")
        if sum(line.endswith(_TERMINAL) for line in lines) <= self.least_punctuated * len(lines):
            return Dropped("few lines end in punctuation")
        if duplicated(lines)[1] >= self.most_duplicated:
            return Dropped("repeated lines")
        if sum(len(line) < _SHORT for line in lines) >= self.most_short * len(lines):
            return Dropped("short lines")
        return document


_SHORT = 30
