"""A document on its way through a recipe, and what a step may make of it."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Document(NamedTuple):
    """A text, where it came from, and what earlier steps found out about it."""

    text: str
    name: str
    """The source's name, the file and the place in it."""
    source: str
    labels: Mapping[str, Any] = MappingProxyType({})
    """`split`, `language`, ...: JSON values, kept in the output beside the text."""

    @property
    def held_out(self) -> bool:
        """Whether it is for validation."""
        return self.labels.get("split") == "valid"

    def labelled(self, **labels: Any) -> "Document":
        """The same with further labels."""
        return self._replace(labels={**self.labels, **labels})

    @property
    def tokens(self) -> int | None:
        """Of its text, where the recipe names a tokenizer to count them with."""
        return self.labels.get("tokens")

    @property
    def size(self) -> int:
        """Bytes of its text in UTF-8."""
        return len(self.text.encode("utf-8"))


class Changed(NamedTuple):
    """A document that goes on, changed or with something to count."""

    document: Document
    what: tuple[str, ...] = ()
    """What was done to its text, a word for each time: counted, and shown by examples."""
    found: tuple[str, ...] = ()
    """What was seen in it: counted."""


class Dropped(NamedTuple):
    """A document that ends here."""

    why: str
    found: tuple[str, ...] = ()
    """What was seen in it: counted."""


Outcome = Document | Changed | Dropped
"""What a step returns. A document that is given back as it was went through without a word."""


def as_line(document: Document) -> str:
    """The document as a line of JSON, which `from_line` reads."""
    values = document._asdict() | {"labels": dict(document.labels)}
    return json.dumps(values, ensure_ascii=False) + "\n"


def from_line(line: str) -> Document:
    """The document of a line that `as_line` wrote."""
    return Document(**json.loads(line))
