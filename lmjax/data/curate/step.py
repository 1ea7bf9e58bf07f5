"""The two kinds of steps: one looks at a document at a time, the other at all of them first.

A step is a config class: its fields are its settings. What takes the whole corpus into account is a pass in three
parts: `keys` makes a few numbers of each document, `decide` sees those of all, in order, and `judge` then treats each
document by what was decided. Numbers travel as named arrays, since steps run in several processes, one after a kill of
the other.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.curate.document import Document, Outcome
from lmjax.schema import config_class

Arrays = Mapping[str, np.ndarray]


class Learned(NamedTuple):
    """What was made of the corpus, or of other texts, before documents are treated."""

    arrays: Arrays
    facts: Mapping[str, Any]
    """For the report: JSON values."""


class Column(NamedTuple):
    """One key of all documents: the values of each end to end."""

    values: Sequence[np.ndarray]
    """By chunk of documents, each mapped from its file."""
    ends: np.ndarray
    """int64 per document: where its values end, counted through all chunks."""


class Keys(NamedTuple):
    """What `keys` made of all documents, in order."""

    columns: Mapping[str, Column]
    held_out: np.ndarray
    """bool per document."""


@config_class
class DocumentStep:
    """A step that looks at one document at a time."""

    def inputs(self) -> tuple[str, ...]:
        """Files that it reads besides the corpus: a change of theirs changes the recipe."""
        return ()

    def versions(self) -> Mapping[str, str]:
        """Of what it uses beside packages, by name: another version may give another result. Raises DataError for what
        is not installed."""
        return {}

    def fit(self) -> Learned:
        """What it needs to know first; made once, kept on disk. Raises DataError for files that do not do."""
        return Learned({}, {})

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        """The step as a function. Raises DataError for a package that is not installed."""
        raise NotImplementedError


@config_class
class CorpusStep:
    """A pass: it looks at all documents before it treats the first."""

    def keys(self) -> Callable[[Document], Arrays]:
        """The function from a document to its keys: arrays of one axis, of the same names for every document."""
        raise NotImplementedError

    def decide(self, keys: Keys) -> Learned:
        """What the keys of all documents come to."""
        raise NotImplementedError

    def judge(self, arrays: Arrays) -> Callable[[int, Document], Outcome]:
        """The function that treats a document, given its number among those that `keys` saw."""
        raise NotImplementedError
