"""What is there twice: whole documents, and lines or paragraphs of them."""

import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import Literal

import numpy as np

from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.equal import Clusters, shared
from lmjax.data.curate.hashing import hash_text, words
from lmjax.data.curate.step import Arrays, CorpusStep, Keys, Learned
from lmjax.schema import NonNegativeInt, PositiveInt, config_class


@config_class
class ExactDuplicates(CorpusStep):
    """Keep the first of equal documents, or the one that is for validation."""

    normalized: bool = True
    """Documents with the same words are equal, whatever their case, punctuation and white space."""

    def keys(self) -> Callable[[Document], Arrays]:
        def key(document: Document) -> Arrays:
            text = " ".join(words(document.text)) if self.normalized else document.text
            return {"text": np.array([hash_text(text or document.text)], np.uint64)}

        return key

    def decide(self, keys: Keys) -> Learned:
        clusters = Clusters(keys.held_out)
        for _, documents in shared(keys.columns["text"]):
            clusters.join(documents.tolist())
        return Learned({"verdicts": clusters.verdicts()}, {"cluster_sizes": clusters.sizes()})

    def judge(self, arrays: Arrays) -> Callable[[int, Document], Outcome]:
        return dropping(arrays["verdicts"], "duplicate")


def dropping(verdicts: np.ndarray, what: str) -> Callable[[int, Document], Outcome]:
    """The function that drops the documents whose `Clusters.verdicts` are not 0."""
    reasons = (None, f"a {what}", f"a {what} of a document for validation")

    def judge(number: int, document: Document) -> Outcome:
        reason = reasons[verdicts[number]]
        return document if reason is None else Dropped(reason)

    return judge


@config_class
class RepeatedParts(CorpusStep):
    """Take lines or paragraphs that several documents share out of them: menus, notices, licences."""

    part: Literal["line", "paragraph"] = "paragraph"
    """A paragraph is what stands between empty lines."""
    most: PositiveInt = 1
    """In how many documents a part may be."""
    least_characters: NonNegativeInt = 20
    """Shorter parts stay: they may be equal by chance."""
    keep_first: bool = True
    """The part stays in the first of the documents, as in C4; otherwise it goes everywhere."""

    def keys(self) -> Callable[[Document], Arrays]:
        def key(document: Document) -> Arrays:
            hashes = [value for _, value in self._parts(document.text) if value]
            return {"parts": np.unique(np.array(hashes, np.uint64))}

        return key

    def decide(self, keys: Keys) -> Learned:
        parts, first, sizes = [], [], Counter[str]()
        for part, documents in shared(keys.columns["parts"]):
            if len(documents) > self.most:
                parts.append(part)
                first.append(documents[np.argmax(keys.held_out[documents])])  # the first for validation, or of all
                sizes[str(len(documents))] += 1
        order = np.argsort(np.array(parts, np.uint64))
        arrays = {"parts": np.array(parts, np.uint64)[order], "first": np.array(first, np.int64)[order]}
        return Learned(arrays, {"cluster_sizes": dict(sizes)})

    def judge(self, arrays: Arrays) -> Callable[[int, Document], Outcome]:
        repeated, first = arrays["parts"], arrays["first"]

        def is_extra(number: int, value: int) -> bool:
            place = int(np.searchsorted(repeated, np.uint64(value))) if value else len(repeated)
            known = place < len(repeated) and repeated[place] == value
            return bool(known and not (self.keep_first and first[place] == number))

        def judge(number: int, document: Document) -> Outcome:
            parts = self._parts(document.text)
            kept = [part for part, value in parts if not is_extra(number, value)]
            if len(kept) == len(parts):
                return document
            text = "".join(kept)
            if not text.strip():
                return Dropped("nothing is left")
            return Changed(document._replace(text=text), (f"a repeated {self.part}",) * (len(parts) - len(kept)))

        return judge

    def _parts(self, text: str) -> list[tuple[str, int]]:
        """The parts, end to end the text, each with its hash, 0 for those that are too short."""
        pieces = re.split(r"(\n)" if self.part == "line" else r"(\n\s*\n)", text)
        joined = itertools.zip_longest(pieces[::2], pieces[1::2], fillvalue="")
        parts = [part + end for part, end in joined if part or end]
        spelled = (" ".join(part.split()) for part in parts)
        hashes = [max(1, hash_text(part)) if len(part) >= self.least_characters else 0 for part in spelled]
        return list(zip(parts, hashes, strict=True))
