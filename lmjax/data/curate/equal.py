"""Documents that share a key, found in memory that does not grow with the number of keys."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from lmjax.data.curate.step import Column

_MOST_KEYS = 1 << 22  # that are sorted at a time: 16 bytes each


def shared(column: Column, most: int = _MOST_KEYS) -> Iterator[tuple[int, np.ndarray]]:
    """Each key that several documents have, with their numbers, ascending.

    The keys are uint64 hashes; they are sorted in parts, by their remainder, of about `most` keys each.
    """
    total = int(column.ends[-1]) if len(column.ends) else 0
    parts = max(1, -(-total // most))
    for part in range(parts):
        yield from _shared_of_part(column, parts, part)


def _shared_of_part(column: Column, parts: int, part: int) -> Iterator[tuple[int, np.ndarray]]:
    keys, places, start = [], [], 0
    for values in column.values:
        chosen = np.flatnonzero(values % np.uint64(parts) == part)
        keys.append(values[chosen])
        places.append(start + chosen)
        start += len(values)
    key, place = np.concatenate(keys), np.concatenate(places)
    order = np.argsort(key, kind="stable")
    key, place = key[order], place[order]
    edges = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1], [True]])) if len(key) else np.zeros(1, int)
    for low, high in itertools.pairwise(edges):
        if high - low > 1:
            documents = np.unique(np.searchsorted(column.ends, place[low:high], side="right"))
            if len(documents) > 1:
                yield int(key[low]), documents


class Clusters:
    """Documents that belong together, by union and find; each is known by the member that is kept."""

    def __init__(self, held_out: np.ndarray):
        # Validation comes first: what is like one of its documents is not to be trained on.
        self._rank = np.argsort(np.argsort(~held_out, kind="stable"), kind="stable")
        self._held_out = held_out
        self._parent = np.arange(len(held_out))

    def find(self, document: int) -> int:
        """The member that is kept."""
        root = document
        while self._parent[root] != root:
            root = int(self._parent[root])
        while self._parent[document] != root:
            self._parent[document], document = root, int(self._parent[document])
        return root

    def join(self, documents: Sequence[int]) -> None:
        """Put the clusters of these documents together."""
        roots = sorted({self.find(document) for document in documents}, key=lambda root: self._rank[root])
        for root in roots[1:]:
            self._parent[root] = roots[0]

    def verdicts(self) -> np.ndarray:
        """uint8 per document: 0 for those that are kept, 1 for others, 2 for those like a document of validation."""
        roots = np.array([self.find(document) for document in range(len(self._parent))], int)
        dropped = roots != np.arange(len(roots))
        return np.where(dropped, np.where(self._held_out[roots] & ~self._held_out, 2, 1), 0).astype(np.uint8)

    def sizes(self) -> dict[str, int]:
        """How many clusters there are, by their size, of two and more."""
        roots = np.array([self.find(document) for document in range(len(self._parent))], int)
        sizes, counts = np.unique(np.unique(roots, return_counts=True)[1], return_counts=True)
        return {str(size): int(count) for size, count in zip(sizes, counts, strict=True) if size > 1}
