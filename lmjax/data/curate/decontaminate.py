"""Items of evaluation sets that stand in the corpus: documents with a long run of words of theirs are dropped, or cut.

As in GPT-3 (Brown et al., arXiv:2005.14165, appendix C): runs of 13 words, in lower case and without punctuation; of a
shorter passage all of its words, from 8 on; where a document is cut, 200 characters on either side go, too, pieces of
fewer are dropped, and so is a document in more than ten pieces.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from lmjax.data.config import PrepareConfig
from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.hashing import WORD, hash_runs, hash_words, words
from lmjax.data.curate.step import Arrays, DocumentStep, Learned
from lmjax.data.prepare.sources import list_inputs, read_records
from lmjax.schema import NonNegativeInt, PositiveInt, config_class


@config_class
class Decontaminate(DocumentStep):
    """Keep the items of evaluation sets out of the corpus."""

    sets: dict[str, str]
    """The sets by name: files of JSON lines, one item each, all strings of which are looked for, each by itself."""
    n: Annotated[int, Field(ge=2, le=64)] = 13
    """Words in a run."""
    least_words: PositiveInt = 8
    """Passages of fewer words are not looked for; items that have no other are counted."""
    action: Literal["drop", "cut"] = "drop"
    """What happens to a document with such a run."""
    margin: NonNegativeInt = 200
    """Characters that go on either side of a run that is cut; shorter pieces go as a whole."""
    most_pieces: PositiveInt = 10

    def inputs(self) -> tuple[str, ...]:
        return tuple(self.sets.values())

    def fit(self) -> Learned:
        runs: dict[int, list[np.ndarray]] = {}
        owners: dict[int, list[np.ndarray]] = {}
        facts: dict[str, Any] = {}
        for place, (name, pattern) in enumerate(sorted(self.sets.items())):
            items = short = 0
            for items, passages in enumerate(_items(pattern), 1):
                looked_for = [spelled for spelled in map(words, passages) if len(spelled) >= self.least_words]
                short += not looked_for
                for spelled in looked_for:
                    length = min(self.n, len(spelled))
                    hashes = hash_runs(hash_words(spelled), length)
                    runs.setdefault(length, []).append(hashes)
                    owners.setdefault(length, []).append(np.full(len(hashes), place << 32 | items - 1))
            facts[name] = {"items": items, "too_short": short}
        return Learned(_index(runs, owners), {"sets": facts})

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        names = sorted(self.sets)
        lengths = sorted(int(name.removeprefix("runs ")) for name in arrays if name.startswith("runs "))

        def check(document: Document) -> Outcome:
            spelled = words(document.text)
            hashes = hash_words(spelled)
            owners: set[int] = set()
            hit = np.zeros(len(spelled), bool)
            for length in lengths:
                index, found = arrays[f"runs {length}"], hash_runs(hashes, length)
                low = np.searchsorted(index, found, side="left")
                high = np.searchsorted(index, found, side="right")
                for place in np.flatnonzero(high > low):
                    owners.update(arrays[f"owners {length}"][low[place] : high[place]].tolist())
                    hit[place : place + length] = True
            if not owners:
                return document
            items = tuple(f"{names[owner >> 32]}: item {owner & 0xFFFFFFFF}" for owner in sorted(owners))
            why = "holds an item of " + ", ".join(sorted({names[owner >> 32] for owner in owners}))
            return Dropped(why, items) if self.action == "drop" else self._cut(document, hit, why, items)

        return check

    def _cut(self, document: Document, hit: np.ndarray, why: str, items: tuple[str, ...]) -> Outcome:
        text = document.text
        spans = [match.span() for match in WORD.finditer(text)]
        if len(spans) != len(hit):  # a letter whose lower case is no letter: the words are counted otherwise
            return Dropped(why, items)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], hit, [False]]).astype(np.int8)))
        pieces, end = [], 0
        for first, after in edges.reshape(-1, 2):
            pieces.append(text[end : max(end, spans[first][0] - self.margin)])
            end = min(len(text), spans[after - 1][1] + self.margin)
        pieces = [piece for piece in (*pieces, text[end:]) if piece.strip() and len(piece) >= self.margin]
        if not pieces or len(pieces) > self.most_pieces:
            return Dropped(why, items)
        return Changed(document._replace(text="\n\n".join(pieces)), (why.replace("holds", "cut"),), items)


def _index(runs: dict[int, list[np.ndarray]], owners: dict[int, list[np.ndarray]]) -> Arrays:
    """By length of run: the hashes, ascending, and whose each is."""
    arrays = {}
    for length, hashes in runs.items():
        joined = np.concatenate(hashes)
        order = np.argsort(joined, kind="stable")
        arrays[f"runs {length}"] = joined[order]
        arrays[f"owners {length}"] = np.concatenate(owners[length])[order]
    return arrays


def _items(pattern: str) -> Iterator[list[str]]:
    """The strings of each item."""
    for record in read_records(list_inputs((pattern,)), PrepareConfig(inputs=(pattern,))):
        yield list(_strings(record))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _strings(child)
