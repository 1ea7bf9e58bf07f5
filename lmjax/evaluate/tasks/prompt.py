"""A question, and what is read before its answer."""

from typing import NamedTuple


class Item(NamedTuple):
    """One question as its file has it."""

    context: str
    """What stands before the answer; of a text that is only read, the text."""
    choices: tuple[str, ...] = ()
    """Possible answers, or the one answer of a question without choices."""
    gold: int = 0
    """Which choice is right."""
    category: str = ""
    """Part of the benchmark that has a number of its own."""
    description: str = ""
    """Stands before the examples."""
    references: tuple[str, ...] = ()
    """What people wrote where a model writes."""
    patterns: tuple[str, ...] = ()
    """Regular expressions that are looked for in what a model writes."""


class Prompt(NamedTuple):
    """A question with its examples."""

    number: int
    """Its place in the file, from 0."""
    item: Item
    context: str
    """All that is read before the answer."""
    delimiter: str
    """Begins the answer."""

    @property
    def continuations(self) -> list[str]:
        """The choices as they follow the context."""
        return [self.delimiter + choice for choice in self.item.choices]

    @property
    def answer(self) -> str:
        return self.item.choices[self.item.gold]
