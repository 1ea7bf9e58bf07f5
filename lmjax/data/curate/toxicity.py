"""Toxic passages, by a classifier that one trains on labelled texts: what is toxic depends on the purpose."""

import re
from collections.abc import Callable
from typing import Literal

from lmjax.data.curate.classifier import Classifier, load_classifier
from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.hashing import words
from lmjax.data.curate.labelled import Labelled
from lmjax.data.curate.privacy import Match, masked
from lmjax.data.curate.quality import tenth
from lmjax.data.curate.step import Arrays, DocumentStep, Learned
from lmjax.errors import ConfigError
from lmjax.schema import Fraction, PositiveInt, config_class

_MARKS = ".!?؟۔。！？"
_SENTENCE = re.compile(rf"[^\s{_MARKS}](?:[^\n{_MARKS}]|\n(?!\s*\n)|[{_MARKS}](?!\s|\Z))*[{_MARKS}]*")
"""Up to a mark before white space, or to an empty line."""


@config_class
class Toxicity(Labelled, DocumentStep):
    """Drop documents with toxic sentences, or mask these, by what a classifier learned from labelled texts.

    A mask, `<toxic>`, takes the place of a sentence, and no other character changes.
    """

    classifier: str | None = None
    """A file, *.classifier, that `lmjax classifier` made, in place of `labelled`."""
    most: Fraction = 0.9
    """Probability of being toxic, were both kinds equally frequent, above which a sentence is."""
    least_words: PositiveInt = 4
    """Shorter sentences stay: what a word or two mean depends on the others."""
    action: Literal["drop", "mask"] = "drop"
    least: PositiveInt = 1
    """How many toxic sentences it takes to drop a document."""

    def __post_init__(self) -> None:
        if bool(self.labelled) == (self.classifier is not None):
            raise ConfigError("toxicity takes either labelled texts to learn from or a classifier that has learned")

    def inputs(self) -> tuple[str, ...]:
        return self.labelled if self.classifier is None else (self.classifier,)

    def fit(self) -> Learned:
        if self.classifier is not None:
            return Learned({"weights": load_classifier(self.classifier).weights}, {"classifier": self.classifier})
        classifier, facts = self.learn([*self.examples()])
        return Learned({"weights": classifier.weights}, facts)

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        classifier = Classifier(arrays["weights"])

        def treat(document: Document) -> Outcome:
            sentences = [(match.start(), match[0].rstrip()) for match in _SENTENCE.finditer(document.text)]
            sentences = [one for one in sentences if len(words(one[1])) >= self.least_words]
            scores = classifier.score(sentence for _, sentence in sentences)
            found = (tenth(max(scores, default=0.0)),)
            scored = zip(sentences, scores, strict=True)
            toxic = [Match(at, at + len(sentence), "toxic") for (at, sentence), score in scored if score > self.most]
            if not toxic or (self.action == "drop" and len(toxic) < self.least):
                return Changed(document, found=found)
            if self.action == "drop":
                return Dropped("toxic", found)
            text = masked(document.text, toxic)
            return Changed(document._replace(text=text), ("a toxic sentence",) * len(toxic), found)

        return treat
