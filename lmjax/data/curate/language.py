"""Which language a document is in."""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from lmjax.data.curate import packages
from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.step import Arrays, DocumentStep
from lmjax.schema import Fraction, PositiveInt, config_class


@config_class
class Language(DocumentStep):
    """Keep documents of some languages, and label all with theirs, by py3langid (Lui and Baldwin, 2012: naive Bayes
    over byte n-grams, of 140 languages)."""

    keep: tuple[Annotated[str, Field(pattern="^[a-z]{2,3}$")], ...] = ()
    """ISO 639 codes: en, fa, de; none keeps all."""
    least: Fraction = 0.5
    """Drop documents whose most probable language is less probable."""
    characters: PositiveInt = 4000
    """How much of a document is looked at: equal parts from its beginning, its middle and its end."""

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        language_of = identifier(self.characters)

        def identify(document: Document) -> Outcome:
            language, probability = language_of(document.text)
            found = (language,)
            if self.keep and language not in self.keep:
                return Dropped("in another language", found)
            if probability < self.least:
                return Dropped("in no language for sure", found)
            return Changed(document.labelled(language=language), found=found)

        return identify


def identifier(characters: int = 4000) -> Callable[[str], tuple[str, float]]:
    """The function from a text to its most probable language and how probable that is, by so many of its characters.

    Raises DataError where py3langid is not installed.
    """
    module = packages.load("py3langid.langid", "language")
    model = module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)

    def classify(text: str) -> tuple[str, float]:
        language, probability = model.classify(sample(text, characters))
        return str(language), float(probability)

    return classify


def sample(text: str, characters: int) -> str:
    """The text if it is short, else a third of so many characters from its beginning, middle and end."""
    if len(text) <= characters:
        return text
    part = max(1, characters // 3)
    middle = (len(text) - part) // 2
    return "\n".join((text[:part], text[middle : middle + part], text[-part:]))
