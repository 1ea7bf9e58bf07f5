"""A classifier of quality, learned from two sets of documents: what is good, and what is not.

Logistic regression over hashed words and pairs of words, as GPT-3's filter of Common Crawl (Brown et al.,
arXiv:2005.14165, appendix A) and, with fastText, DCLM's (Li et al., arXiv:2406.11794, section 4.4).
"""

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from lmjax.data.config import PrepareConfig
from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.hashing import hash_runs, hash_text, hash_words, words
from lmjax.data.curate.step import Arrays, DocumentStep, Learned
from lmjax.data.prepare.sources import list_inputs, read_documents
from lmjax.errors import DataError
from lmjax.schema import Fraction, PositiveFloat, PositiveInt, Seed, config_class

_LEAST_PASSAGES = 20


@config_class
class Quality(DocumentStep):
    """Keep documents that are more like those of `good` than like those of `bad`."""

    good: tuple[str, ...]
    """Files, by glob, of documents as one wants them."""
    bad: tuple[str, ...]
    least: Fraction = 0.5
    """Probability of being good, were both kinds equally frequent, below which a document is dropped."""
    text_key: str = "text"
    """Of the JSON lines and Parquet files among them."""
    buckets: Annotated[int, Field(ge=1 << 8, le=1 << 24)] = 1 << 18
    """For the hashes of words and of pairs of words."""
    passage_words: PositiveInt = 200
    """What it learns from are passages of so many words."""
    passages: PositiveInt = 20
    """At most, of a document."""
    epochs: PositiveInt = 5
    rate: PositiveFloat = 2.0
    """Of the first update; it falls to zero in a line."""
    seed: Seed = 0

    def inputs(self) -> tuple[str, ...]:
        return (*self.good, *self.bad)

    def fit(self) -> Learned:
        examples = [(features, label, held) for label, files in ((0.0, self.bad), (1.0, self.good))
                    for features, held in self._examples(files)]  # fmt: skip
        training = [(features, label) for features, label, held in examples if not held]
        if min(sum(label == wanted for _, label in training) for wanted in (0.0, 1.0)) < _LEAST_PASSAGES:
            raise DataError(
                f"the step quality needs {_LEAST_PASSAGES} passages of {self.passage_words} words at least, of good "
                "and of bad documents; give more files, or a smaller passage_words"
            )
        weights = self._learn(training)
        measured = [(score(weights, features) > 0, label > 0.5) for features, label, held in examples if held]
        right = [guess == truth for guess, truth in measured]
        facts: dict[str, Any] = {"passages": len(training), "passages_held_out": len(measured)}
        return Learned({"weights": weights}, facts | {"accuracy": round(float(np.mean(right)), 4) if right else None})

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        weights = arrays["weights"]

        def judge(document: Document) -> Outcome:
            probability = _logistic(score(weights, self.features(words(document.text))))
            tenth = (f"probability {math.floor(min(probability, 0.999) * 10) / 10:.1f}",)
            if probability < self.least:
                return Dropped("of low quality", tenth)
            return Changed(document.labelled(quality=round(probability, 4)), found=tenth)

        return judge

    def features(self, spelled: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(buckets, values): the logarithms of how often words and pairs occur, scaled to length 1."""
        hashes = hash_words(spelled)
        hashed = np.concatenate([hash_runs(hashes, 1), hash_runs(hashes, 2)]) % np.uint64(self.buckets)
        places, counts = np.unique(hashed.astype(np.int64), return_counts=True)
        values = np.log1p(counts)
        return places, values / max(float(np.linalg.norm(values)), 1e-9)

    def _examples(self, patterns: tuple[str, ...]) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], bool]]:
        """The features of each passage, and whether its document measures the classifier instead of teaching it."""
        cfg = PrepareConfig(inputs=patterns, text_key=self.text_key, invalid_utf8="replace")
        for document in read_documents(list_inputs(patterns), cfg, lambda n_bytes: None):
            spelled = words(document.text or "")
            held = hash_text(f"{self.seed} {document.text}") % 10 == 0
            starts = range(0, max(1, len(spelled) - self.passage_words // 2), self.passage_words)
            chosen = starts if len(starts) <= self.passages else starts[:: -(-len(starts) // self.passages)]
            for start in chosen if spelled else ():
                yield self.features(spelled[start : start + self.passage_words]), held

    def _learn(self, examples: list[tuple[tuple[np.ndarray, np.ndarray], float]]) -> np.ndarray:
        """float64 weights by bucket, the bias last: stochastic gradient descent, both kinds of equal weight."""
        weights = np.zeros(self.buckets + 1)
        count = {wanted: sum(label == wanted for _, label in examples) for wanted in (0.0, 1.0)}
        rng = np.random.default_rng([self.seed, 2])
        order = np.concatenate([rng.permutation(len(examples)) for _ in range(self.epochs)])
        for step, index in enumerate(order):
            (places, values), label = examples[index]
            balance = len(examples) / (2 * count[label])
            rate = self.rate * (1 - step / len(order)) * balance
            error = label - _logistic(score(weights, (places, values)))
            weights[places] += rate * error * values
            weights[-1] += rate * error * _BIAS
        return weights


_BIAS = 0.1


def score(weights: np.ndarray, features: tuple[np.ndarray, np.ndarray]) -> float:
    """The logarithm of the odds of being good."""
    places, values = features
    return float(weights[places] @ values + weights[-1] * _BIAS)


def _logistic(log_odds: float) -> float:
    return 1 / (1 + math.exp(-max(-500.0, log_odds)))
