"""Names of people, by the named entities of a spaCy pipeline."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from lmjax.data.curate import packages
from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.privacy import Match, masked
from lmjax.data.curate.step import Arrays, DocumentStep, Learned
from lmjax.data.tokenizers.sections import sections
from lmjax.errors import DataError
from lmjax.schema import config_class


@config_class
class Names(DocumentStep):
    """Mask the names of people, or drop documents that have any, as far as a spaCy pipeline finds them.

    A mask, `<name>`, takes the place of a name, and no other character changes. The pipeline is a statistical model of
    one language: it misses some names, and takes some other words for one.
    """

    pipeline: str = "en_core_web_sm"
    """The name of a pipeline that is installed, or the folder of one."""
    kinds: tuple[str, ...] = ("PERSON", "PER", "PRS")
    """What the pipeline calls such entities."""
    action: Literal["mask", "drop"] = "mask"

    def versions(self) -> Mapping[str, str]:
        meta = _load(self.pipeline).meta
        return {f"{meta['lang']}_{meta['name']}": meta["version"]}

    def fit(self) -> Learned:
        ((name, version),) = self.versions().items()
        return Learned({}, {"pipeline": f"{name} {version}"})

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        pipeline = _load(self.pipeline)

        def treat(document: Document) -> Outcome:
            names, start = [], 0
            for part in sections(document.text):
                found = [entity for entity in pipeline(part).ents if entity.label_ in self.kinds]
                names += [Match(start + entity.start_char, start + entity.end_char, "name") for entity in found]
                start += len(part)
            if not names:
                return document
            if self.action == "drop":
                return Dropped("holds a name")
            return Changed(document._replace(text=masked(document.text, names)), ("a name",) * len(names))

        return treat


def _load(pipeline: str) -> Any:
    """The pipeline, without what finds no entities. Raises DataError where it, or spaCy, is not installed."""
    spacy = packages.load("spacy", "names")
    try:
        return spacy.load(pipeline, exclude=["tagger", "parser", "morphologizer", "attribute_ruler", "lemmatizer"])
    except (OSError, ValueError) as error:
        raise DataError(
            f"the step names has no spaCy pipeline {pipeline!r}: install it (python -m spacy download {pipeline}), or "
            "give the name or the folder of another"
        ) from error
