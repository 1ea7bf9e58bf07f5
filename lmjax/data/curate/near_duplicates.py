"""Documents that are nearly the same: candidates by MinHash and banding, then the exact similarity of each pair.

The similarity is Jaccard's, of the sets of runs of words (Broder, On the resemblance and containment of documents,
1997). A band is a part of a signature; two documents of similarity s agree in one of b bands of r rows with
probability 1 - (1 - s^r)^b (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4). With the default
21 bands of 6 rows that is 0.998 at 0.8, and 0.28 at 0.5: what is less similar costs a comparison, and no mistake.
"""

from collections.abc import Callable, Iterator

import numpy as np

from lmjax.data.curate import packages
from lmjax.data.curate.document import Document, Outcome
from lmjax.data.curate.duplicates import dropping
from lmjax.data.curate.equal import Clusters, shared
from lmjax.data.curate.hashing import hash_columns, hash_runs, hash_words, words
from lmjax.data.curate.step import Arrays, Column, CorpusStep, Keys, Learned
from lmjax.schema import Fraction, PositiveInt, Seed, config_class


@config_class
class NearDuplicates(CorpusStep):
    """Keep one of the documents that are nearly the same: the first, or one that is for validation.

    Documents are in one cluster when a chain of pairs joins them, each at least as similar as the threshold.
    """

    threshold: Fraction = 0.8
    """Jaccard similarity of the sets of runs of words."""
    shingle: PositiveInt = 5
    """Words in a run."""
    bands: PositiveInt = 21
    rows: PositiveInt = 6
    """Of a band; bands x rows is the number of permutations."""
    seed: Seed = 1

    def keys(self) -> Callable[[Document], Arrays]:
        rensa = packages.load("rensa", "near_duplicates")

        def key(document: Document) -> Arrays:
            runs = shingles(document.text, self.shingle)
            permutations = self.bands * self.rows
            matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(runs, [0, len(runs)], permutations, self.seed)
            signature = np.array(matrix.to_rows()[0], np.uint64).reshape(self.bands, self.rows)
            bands = hash_columns([np.arange(self.bands, dtype=np.uint64), *signature.T])
            return {"bands": bands, "runs": np.unique(runs.astype(np.uint32))}

        return key

    def decide(self, keys: Keys) -> Learned:
        clusters = Clusters(keys.held_out)
        runs = _Sets(keys.columns["runs"])
        compared = joined = 0
        for _, documents in shared(keys.columns["bands"]):
            groups: dict[int, list[int]] = {}  # documents of the band, by their cluster
            for document in documents.tolist():
                for member in _others(groups, clusters.find(document)):
                    if clusters.find(member) == clusters.find(document):
                        continue
                    compared += 1
                    if runs.similarity(member, document) >= self.threshold:
                        joined += 1
                        clusters.join((member, document))
                groups.setdefault(clusters.find(document), []).append(document)
        facts = {"cluster_sizes": clusters.sizes(), "pairs_compared": compared, "pairs_joined": joined}
        return Learned({"verdicts": clusters.verdicts()}, facts)

    def judge(self, arrays: Arrays) -> Callable[[int, Document], Outcome]:
        return dropping(arrays["verdicts"], "near duplicate")


def _others(groups: dict[int, list[int]], own: int) -> Iterator[int]:
    """The members of all groups but one's own."""
    yield from (member for root, members in list(groups.items()) if root != own for member in members)


def shingles(text: str, n: int) -> np.ndarray:
    """uint64 per run of n words; of a shorter text the one run that it is."""
    spelled = words(text) or text.split() or [text]
    return hash_runs(hash_words(spelled), min(n, len(spelled)))


class _Sets:
    """The sorted runs of each document."""

    def __init__(self, column: Column):
        self._column = column
        self._chunk_ends = np.cumsum([len(values) for values in column.values])

    def similarity(self, first: int, second: int) -> float:
        """Jaccard's: the size of the intersection over that of the union. Runs are told apart by 32 bits."""
        one, other = self._of(first), self._of(second)
        common = len(np.intersect1d(one, other, assume_unique=True))
        return common / (len(one) + len(other) - common)

    def _of(self, document: int) -> np.ndarray:
        end = int(self._column.ends[document])
        start = int(self._column.ends[document - 1]) if document else 0
        chunk = int(np.searchsorted(self._chunk_ends, start, side="right"))
        before = int(self._chunk_ends[chunk - 1]) if chunk else 0
        return self._column.values[chunk][start - before : end - before]
