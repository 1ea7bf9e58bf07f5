"""A classifier of texts that one trains here: logistic regression over hashed words and pairs of words.

As GPT-3's filter of Common Crawl (Brown et al., arXiv:2005.14165, appendix A) and, with fastText, DCLM's (Li et al.,
arXiv:2406.11794, section 4.4). It learns one text at a time and its bits depend on nothing but the texts, their order
and the settings.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from lmjax.data.curate.hashing import hash_runs, hash_text, hash_words, words
from lmjax.errors import DataError
from lmjax.record import formats
from lmjax.record.files import hash_bytes, locate, read_bytes, write_bytes
from lmjax.schema import PositiveFloat, PositiveInt, Seed, config_class

FORMAT = 1
LEAST = 20
"""Examples of each kind."""
_BIAS = 0.1

Features = tuple[np.ndarray, np.ndarray]
"""(buckets, values): the logarithms of how often words and pairs occur, scaled to length 1."""


class Example(NamedTuple):
    """A text to learn from."""

    features: Features
    positive: bool
    held_out: bool
    """It measures the classifier instead of teaching it."""


class Classifier(NamedTuple):
    """What was learned."""

    weights: np.ndarray
    """float64 by bucket, the bias last."""

    @property
    def buckets(self) -> int:
        """For the hashes of words and of pairs of words."""
        return len(self.weights) - 1

    def log_odds(self, given: Features) -> float:
        """The logarithm of the odds of being positive, were both kinds equally frequent."""
        places, values = given
        return float(self.weights[places] @ values + self.weights[-1] * _BIAS)

    def probability(self, text: str) -> float:
        """That the text is positive, were both kinds equally frequent."""
        return _logistic(self.log_odds(features(words(text), self.buckets)))

    def score(self, texts: Iterable[str]) -> np.ndarray:
        """float64 per text: `probability`."""
        return np.array([self.probability(text) for text in texts])


@config_class
class Learning:
    """How a classifier learns."""

    buckets: Annotated[int, Field(ge=1 << 8, le=1 << 24)] = 1 << 18
    """For the hashes of words and of pairs of words."""
    epochs: PositiveInt = 5
    rate: PositiveFloat = 2.0
    """Of the first update; it falls to zero in a line."""
    seed: Seed = 0

    def example(self, spelled: list[str], positive: bool, key: str) -> Example:
        """Of the words of a text. Texts of the same key fall to the same side; a tenth is held out."""
        return Example(features(spelled, self.buckets), positive, hash_text(f"{self.seed} {key}") % 10 == 0)

    def learn(self, examples: Sequence[Example]) -> tuple[Classifier, dict[str, Any]]:
        """The classifier, and how it does on what was held out.

        Stochastic gradient descent on the logistic loss, both kinds of equal weight. Raises DataError for too few
        examples of a kind.
        """
        training = [example for example in examples if not example.held_out]
        count = {kind: sum(example.positive is kind for example in training) for kind in (True, False)}
        if min(count.values()) < LEAST:
            raise DataError(f"{count[True]} texts of the one kind and {count[False]} of the other are too few to learn "
                            f"from: at least {LEAST} of each, beside the tenth that is held out")  # fmt: skip
        classifier = Classifier(np.zeros(self.buckets + 1))
        rng = np.random.default_rng([self.seed, 2])
        order = np.concatenate([rng.permutation(len(training)) for _ in range(self.epochs)])
        for step, index in enumerate(order):
            (places, values), positive, _ = training[index]
            rate = self.rate * (1 - step / len(order)) * len(training) / (2 * count[positive])
            error = positive - _logistic(classifier.log_odds((places, values)))
            classifier.weights[places] += rate * error * values
            classifier.weights[-1] += rate * error * _BIAS
        return classifier, {"texts": len(training)} | _measured(classifier, examples)


def features(spelled: list[str], buckets: int) -> Features:
    """The features of a text, given by its words."""
    hashes = hash_words(spelled)
    hashed = np.concatenate([hash_runs(hashes, 1), hash_runs(hashes, 2)]) % np.uint64(buckets)
    places, counts = np.unique(hashed.astype(np.int64), return_counts=True)
    values = np.log1p(counts)
    return places, values / max(float(np.linalg.norm(values)), 1e-9)


def _logistic(log_odds: float) -> float:
    return 1 / (1 + math.exp(-max(-500.0, log_odds)))


def _measured(classifier: Classifier, examples: Sequence[Example]) -> dict[str, Any]:
    """How many were held out, the share that is told right, and the probability that of one of each kind the positive
    one scores higher (the area under the ROC curve)."""
    held = {kind: [classifier.log_odds(one.features) for one in examples if one.held_out and one.positive is kind]
            for kind in (True, False)}  # fmt: skip
    positive, negative = np.array(held[True]), np.sort(held[False])
    count = len(positive) + len(negative)
    right = int((positive > 0).sum() + (negative <= 0).sum())
    below = sum(np.searchsorted(negative, positive, side) for side in ("left", "right")) / 2
    return {
        "held_out": count,
        "accuracy": round(right / count, 4) if count else None,
        "area_under_curve": round(float(np.mean(below)) / len(negative), 4) if held[True] and held[False] else None,
    }


# Files ----------------------------------------------------------------------------------------------------------------


def save_classifier(classifier: Classifier, path: str | os.PathLike[str]) -> None:
    """Write it to a file: a line of JSON, and the weights."""
    content = classifier.weights.astype("<f8").tobytes()
    head = {"classifier": {"buckets": classifier.buckets, "hash": hash_bytes(content)}} | formats.stamp(FORMAT)
    write_bytes(locate(path), json.dumps(head).encode() + b"\n", content)


def load_classifier(path: str | os.PathLike[str]) -> Classifier:
    """The classifier of a file. Raises DataError for one that is missing, damaged, or something else."""
    source = locate(path)
    if not source.exists():
        raise DataError(f"there is no classifier {source}; `lmjax classifier` makes one")
    line, _, content = read_bytes(source).partition(b"\n")
    try:
        described = formats.unstamped(json.loads(line), source, FORMAT, DataError)["classifier"]
        if (len(content), hash_bytes(content)) != (8 * (described["buckets"] + 1), described["hash"]):
            raise ValueError("its weights are not those that were written")
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{source} is no classifier, or damaged ({error}); make it again") from error
    return Classifier(np.frombuffer(content, "<f8"))


def score(texts: Iterable[str], path: str | os.PathLike[str]) -> np.ndarray:
    """float64 per text: the probability, by the classifier of a file, that it is positive."""
    return load_classifier(path).score(texts)
