"""A filter of quality, learned from two sets of documents: what is good, and what is not."""

import math
from collections.abc import Callable, Iterator

from lmjax.data.config import PrepareConfig
from lmjax.data.curate.classifier import LEAST, Classifier, Example, Learning
from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.hashing import words
from lmjax.data.curate.step import Arrays, DocumentStep, Learned
from lmjax.data.prepare.sources import list_inputs, read_documents
from lmjax.errors import DataError
from lmjax.schema import Fraction, PositiveInt, config_class


@config_class
class Quality(Learning, DocumentStep):
    """Keep documents that are more like those of `good` than like those of `bad`."""

    good: tuple[str, ...]
    """Files, by glob, of documents as one wants them."""
    bad: tuple[str, ...]
    least: Fraction = 0.5
    """Probability of being good, were both kinds equally frequent, below which a document is dropped."""
    text_key: str = "text"
    """Of the JSON lines and Parquet files among them."""
    passage_words: PositiveInt = 200
    """What it learns from are passages of so many words."""
    passages: PositiveInt = 20
    """At most, of a document."""

    def inputs(self) -> tuple[str, ...]:
        return (*self.good, *self.bad)

    def fit(self) -> Learned:
        examples = [*self._examples(self.bad, good=False), *self._examples(self.good, good=True)]
        try:
            classifier, facts = self.learn(examples)
        except DataError as error:
            raise DataError(
                f"the step quality needs {LEAST} passages of {self.passage_words} words at least, of good and of bad "
                "documents; give more files, or a smaller passage_words"
            ) from error
        return Learned({"weights": classifier.weights}, facts)

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        classifier = Classifier(arrays["weights"])

        def judge(document: Document) -> Outcome:
            probability = classifier.probability(document.text)
            found = (tenth(probability),)
            if probability < self.least:
                return Dropped("of low quality", found)
            return Changed(document.labelled(quality=round(probability, 4)), found=found)

        return judge

    def _examples(self, patterns: tuple[str, ...], *, good: bool) -> Iterator[Example]:
        """Of each passage; those of one document all teach, or all measure."""
        cfg = PrepareConfig(inputs=patterns, text_key=self.text_key, invalid_utf8="replace")
        for document in read_documents(list_inputs(patterns), cfg, lambda n_bytes: None):
            spelled = words(document.text or "")
            starts = range(0, max(1, len(spelled) - self.passage_words // 2), self.passage_words)
            chosen = starts if len(starts) <= self.passages else starts[:: -(-len(starts) // self.passages)]
            for start in chosen if spelled else ():
                yield self.example(spelled[start : start + self.passage_words], good, document.text or "")


def tenth(probability: float) -> str:
    """`probability 0.3` for 0.3 to 0.4: to count by."""
    return f"probability {math.floor(min(probability, 0.999) * 10) / 10:.1f}"
