"""Lines of files of one's own, in plain fields."""

from collections.abc import Mapping
from typing import Any

from lmjax.evaluate.tasks.prompt import Item


def choices(line: Mapping[str, Any]) -> Item:
    """`context`, `choices`, which of them is right from 0 on, `gold`, and perhaps a `category`."""
    return Item(line["context"], tuple(line["choices"]), line["gold"], line.get("category", ""))


def cloze(line: Mapping[str, Any]) -> Item:
    """`context`, its `continuation`, and perhaps a `category`."""
    return Item(line["context"], (line["continuation"],), category=line.get("category", ""))


def texts(line: Mapping[str, Any]) -> Item:
    """A `text`, and perhaps a `category`."""
    return Item(line["text"], category=line.get("category", ""))
