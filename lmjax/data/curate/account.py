"""What a step did, counted: what went in and came out, why documents were dropped, and examples of each reason."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.hashing import hash_text
from lmjax.data.curate.privacy import mask

EXAMPLES = 10
_SHOWN = 400  # characters of an example
_BEFORE = 80  # of them, before what changed

Count = list[int]
"""[documents, bytes]"""


@dataclasses.dataclass
class Account:
    """Of one step: a part of the documents, or, merged, all of them. Bytes are those of the text in UTF-8."""

    step: str
    read: Count = dataclasses.field(default_factory=lambda: [0, 0])
    """What went in."""
    kept: Count = dataclasses.field(default_factory=lambda: [0, 0])
    """What came out."""
    tokens: Count | None = None
    """[read, kept], where the recipe names a tokenizer."""
    sources: dict[str, Count] = dataclasses.field(default_factory=dict)
    """What came out, by source."""
    lengths: dict[str, int] = dataclasses.field(default_factory=dict)
    """How many documents that came out have at least so many bytes, and fewer than twice as many."""
    dropped: dict[str, Count] = dataclasses.field(default_factory=dict)
    """By reason."""
    changed: dict[str, Count] = dataclasses.field(default_factory=dict)
    """By what was done: how many documents, and how many times."""
    found: dict[str, int] = dataclasses.field(default_factory=dict)
    """How often something was seen."""
    examples: dict[str, list[list[Any]]] = dataclasses.field(default_factory=dict)
    """By reason, or by what was done: [a random number, the document's name, text] of those with the smallest, without
    what is private."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the step learned, in numbers."""

    def add(self, before: Document, outcome: Outcome) -> Document | None:
        """Count what became of a document, and give it back if it goes on."""
        _count(self.read, before.size)
        self._count_tokens(before, read=True)
        for what in () if isinstance(outcome, Document) else outcome.found:
            self.found[what] = self.found.get(what, 0) + 1
        if isinstance(outcome, Dropped):
            _count(self.dropped.setdefault(outcome.why, [0, 0]), before.size)
            self._show(outcome.why, before, lambda: _excerpt(before.text, 0, _SHOWN))
            return None
        after = outcome.document if isinstance(outcome, Changed) else outcome
        if isinstance(outcome, Changed):
            for what in dict.fromkeys(outcome.what):
                times = self.changed.setdefault(what, [0, 0])
                times[0] += 1
                times[1] += outcome.what.count(what)
                self._show(what, before, lambda: _difference(before.text, after.text))
        self.count(after)
        return after

    def count(self, document: Document) -> None:
        """Count a document that comes out."""
        size = document.size
        _count(self.kept, size)
        self._count_tokens(document, read=False)
        _count(self.sources.setdefault(document.source, [0, 0]), size)
        length = str(1 << max(0, size.bit_length() - 1))
        self.lengths[length] = self.lengths.get(length, 0) + 1

    def merge(self, other: "Account") -> None:
        """Add what another part of the documents came to."""
        assert other.step == self.step
        for name in ("read", "kept"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, [a + b for a, b in zip(mine, theirs, strict=True)])
        if other.tokens is not None:
            self.tokens = [a + b for a, b in zip(self.tokens or [0, 0], other.tokens, strict=True)]
        for name in ("sources", "dropped", "changed"):
            for key, value in getattr(other, name).items():
                mine = getattr(self, name)
                mine[key] = [a + b for a, b in zip(mine.get(key, [0, 0]), value, strict=True)]
        for name in ("lengths", "found"):
            for key, value in getattr(other, name).items():
                mine = getattr(self, name)
                mine[key] = mine.get(key, 0) + value
        for key, shown in other.examples.items():
            self.examples[key] = sorted([*self.examples.get(key, []), *shown])[:EXAMPLES]
        self.facts |= other.facts

    def _count_tokens(self, document: Document, *, read: bool) -> None:
        if document.tokens is not None:
            self.tokens = self.tokens or [0, 0]
            self.tokens[0 if read else 1] += document.tokens

    def _show(self, why: str, document: Document, text: Callable[[], str]) -> None:
        draw = hash_text(f"{self.step} {why} {document.name}") >> 16
        shown = self.examples.setdefault(why, [])
        if len(shown) < EXAMPLES or draw < shown[-1][0]:
            shown.append([draw, mask(document.name), text()])
            shown.sort()
            del shown[EXAMPLES:]


def _count(count: Count, size: int) -> None:
    count[0] += 1
    count[1] += size


def _difference(before: str, after: str) -> str:
    """The texts, as it was and as it is, from a little before where they first differ."""
    low, high = 0, min(len(before), len(after))
    while low < high:  # the longest common beginning, by bisection
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before[:middle] == after[:middle] else (low, middle - 1)
    start = max(0, low - _BEFORE)
    return "\n→\n".join(_excerpt(text, start, _SHOWN // 2) for text in (before, after))


def _excerpt(text: str, start: int, length: int) -> str:
    """A part of a text, of whole words. Masks see more than the part: what is private may go on beyond it."""
    low, high = max(0, start - _PRIVATE), start + length + _PRIVATE
    before, part = mask(text[low:start]), mask(text[low:high])
    part = part[len(before) :] if part.startswith(before) else part
    if start and not text[start - 1].isspace():
        part = re.sub(r"^\S+", "", part)
    if len(part) > length:
        part = re.sub(r"\S+\Z", "", part[:length])
    return part.strip()


_PRIVATE = 100
"""Characters, more than anything private is long."""
