"""Rules that tell running text from lists, menus and noise: Gopher's of quality and of repetition.

Rae et al., Scaling Language Models: Methods, Analysis & Insights from Training Gopher (arXiv:2112.11446), appendix A1.1
and, for repetition, its table A1. Words are what white space separates.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from lmjax.data.curate.document import Document, Dropped, Outcome
from lmjax.data.curate.step import Arrays, DocumentStep
from lmjax.schema import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, config_class


@config_class
class Gopher(DocumentStep):
    """Gopher's quality filter: between 50 and 100,000 words, of 3 to 10 characters on average, and the rest."""

    least_words: PositiveInt = 50
    """Of a document."""
    most_words: PositiveInt = 100_000
    """Of a document."""
    least_mean_length: PositiveFloat = 3.0
    """Characters in a word, on average."""
    most_mean_length: PositiveFloat = 10.0
    """Characters in a word, on average."""
    most_symbols: Fraction = 0.1
    """Hashes, and ellipses, per word."""
    most_bullets: Fraction = 0.9
    """Lines that begin with a bullet."""
    most_ellipses: Fraction = 0.3
    """Lines that end with an ellipsis."""
    least_alphabetic: Fraction = 0.8
    """Words with at least one letter."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    least_stop_words: NonNegativeInt = 2
    """How many of the stop words it has at least; 0 for texts that are not English."""

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        def check(document: Document) -> Outcome:
            why = self.fault(document.text)
            return Dropped(why) if why else document

        return check

    def fault(self, text: str) -> str:
        """The first rule that the text breaks, or nothing."""
        words = text.split()
        if len(words) < self.least_words:
            return "too few words"
        if len(words) > self.most_words:
            return "too many words"
        mean = sum(map(len, words)) / len(words)
        if not self.least_mean_length <= mean <= self.most_mean_length:
            return "words too short or too long"
        if max(text.count("#"), text.count("...") + text.count("…")) / len(words) > self.most_symbols:
            return "too many symbols"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if sum(line.startswith(_BULLETS) for line in lines) / len(lines) > self.most_bullets:
            return "too many bullets"
        if sum(line.endswith(("...", "…")) for line in lines) / len(lines) > self.most_ellipses:
            return "too many lines end in an ellipsis"
        if sum(any(map(str.isalpha, word)) for word in words) / len(words) < self.least_alphabetic:
            return "too few words with letters"
        found = {word.strip(_PUNCTUATION).lower() for word in words} & set(self.stop_words)
        return "too few stop words" if len(found) < self.least_stop_words else ""


_BULLETS = ("•", "●", "○", "■", "‣", "·", "-", "*")
_PUNCTUATION = ".,;:!?\"'()[]{}“”‘’«»-"


@config_class
class Repetition(DocumentStep):
    """Gopher's repetition filter: no more of a document than this may be said twice."""

    lines: Fraction = 0.30
    """Lines that were there before, of all lines."""
    paragraphs: Fraction = 0.30
    """Paragraphs that were there before, of all paragraphs."""
    line_characters: Fraction = 0.20
    """Characters in such lines, of all characters."""
    paragraph_characters: Fraction = 0.20
    """Characters in such paragraphs, of all characters."""
    most_frequent: tuple[tuple[PositiveInt, Fraction], ...] = ((2, 0.20), (3, 0.18), (4, 0.16))
    """(n, characters in the most frequent run of n words)."""
    repeated: tuple[tuple[PositiveInt, Fraction], ...] = (
        (5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)
    )  # fmt: skip
    """(n, characters in all runs of n words that were there before, each character once)."""

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        def check(document: Document) -> Outcome:
            why = self.fault(document.text)
            return Dropped(why) if why else document

        return check

    def fault(self, text: str) -> str:
        """The first rule that the text breaks, or nothing."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
        limits = (("lines", lines, self.lines, self.line_characters),
                  ("paragraphs", paragraphs, self.paragraphs, self.paragraph_characters))  # fmt: skip
        for name, parts, most, most_characters in limits:
            share, characters = duplicated(parts)
            if share > most or characters > most_characters:
                return f"repeated {name}"
        words = text.split()
        total = sum(map(len, words))
        for n, most in self.most_frequent:
            if _most_frequent(words, n) > most * total:
                return f"one run of {n} words again and again"
        for n, most in self.repeated:
            if _repeated(words, n) > most * total:
                return f"repeated runs of {n} words"
        return ""


def duplicated(parts: Sequence[str]) -> tuple[float, float]:
    """The share of parts that were there before, and of characters in them."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return count / max(1, len(parts)), characters / max(1, sum(map(len, parts)))


def _most_frequent(words: Sequence[str], n: int) -> int:
    """Characters in all occurrences of the most frequent run of n words; the longest of equally frequent ones."""
    counts = Counter(zip(*(words[place:] for place in range(n)), strict=False))
    if not counts:
        return 0
    most = max(counts.values())
    return max(most * sum(map(len, run)) for run, count in counts.items() if count == most) if most > 1 else 0


def _repeated(words: Sequence[str], n: int) -> int:
    """Characters in runs of n words that were there before, none counted twice."""
    seen: set[tuple[str, ...]] = set()
    characters = place = 0
    while place <= len(words) - n:
        run = tuple(words[place : place + n])
        if run in seen:
            characters += sum(map(len, run))
            place += n
        else:
            seen.add(run)
            place += 1
    return characters
