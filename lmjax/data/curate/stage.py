"""Stages: the steps of a recipe, cut where a pass needs to see all documents, and the work on one chunk of one stage.

The first stage after reading begins with the first step; a stage ends with the keys of a pass, and the next one begins
with its judgement. Chunks are worked on apart from each other, by any process, and come out the same.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from etils import epath

from lmjax.data.curate.account import Account
from lmjax.data.curate.chunk import Chunk, load_learned, save_learned
from lmjax.data.curate.document import Changed, Document, Outcome
from lmjax.data.curate.recipe import Step
from lmjax.data.curate.step import Arrays, CorpusStep, DocumentStep
from lmjax.data.tokenizers.load import load_tokenizer
from lmjax.errors import DataError

Treatment = Callable[[int, Document], Outcome]
"""A step as a function of a document and of its number in the stage before."""


class Stage(NamedTuple):
    """Which steps, by their number, a stage takes documents through."""

    judge: int | None
    """The pass whose judgement comes first."""
    steps: tuple[int, ...]
    keys: int | None
    """The pass that makes its keys at the end."""

    @property
    def all(self) -> tuple[int, ...]:
        """The steps that treat documents, in order."""
        return self.steps if self.judge is None else (self.judge, *self.steps)


def plan(steps: Sequence[tuple[str, Step]]) -> list[Stage]:
    """The stages after reading, in order."""
    passes = [place for place, (_, step) in enumerate(steps) if isinstance(step, CorpusStep)]
    starts, ends = [None, *passes], [*passes, None]
    return [
        Stage(start, tuple(range(0 if start is None else start + 1, len(steps) if end is None else end)), end)
        for start, end in zip(starts, ends, strict=True)
    ]


class Work:
    """One stage, ready to work on its chunks."""

    def __init__(self, folder: epath.Path, steps: Sequence[tuple[str, Step]], number: int, tokenizer: str | None):
        """Stage `number`, from 1. Raises DataError for a package that is not installed."""
        self._count = None if tokenizer is None else _counter(tokenizer)
        self._folder, self._number = folder, number
        stage = plan(steps)[number - 1]
        self._steps = [_ready(folder, place, *steps[place]) for place in stage.all]
        if self._count is not None:
            self._steps = [step._replace(treat=_counting(step.treat, self._count)) for step in self._steps]
        final = None if stage.keys is None else steps[stage.keys][1]
        self._keys: Callable[[Document], Arrays] | None = final.keys() if isinstance(final, CorpusStep) else None

    def do(self, number: int, first: int) -> None:
        """Work on chunk `number`, whose first document is number `first` of the stage before."""
        before = Chunk(self._folder, self._number - 1, number)
        accounts = [Account(step.name) for step in self._steps]
        kept: list[Document] = []
        documents = before.documents()
        if self._count is not None and self._number == 1:
            documents = map(self._count, documents)
        for place, document in enumerate(documents, first):
            left: Document | None = document
            for step, account in zip(self._steps, accounts, strict=True):
                if left is not None:
                    left = account.add(left, step.treat(place, left))
            if left is not None:
                kept.append(left)
        keys = [self._keys(document) for document in kept] if self._keys else []
        Chunk(self._folder, self._number, number).write(kept, keys, accounts)


def _counter(path: str) -> Callable[[Document], Document]:
    """The function that labels a document with the number of its tokens.

    It raises DataError for one that the tokenizer cannot represent.
    """
    tokenizer = load_tokenizer(path)
    tokenizer.replaces_unknown = tokenizer.unknown_id is not None

    def count(document: Document) -> Document:
        try:
            return document.labelled(tokens=len(tokenizer.encode(document.text)))
        except DataError as error:
            raise DataError(f"{document.name}: {error}") from error

    return count


def _counting(treat: Treatment, count: Callable[[Document], Document]) -> Treatment:
    """The same step; tokens are counted again where it has changed the text."""

    def treat_and_count(number: int, document: Document) -> Outcome:
        outcome = treat(number, document)
        if isinstance(outcome, Changed) and outcome.document.text != document.text:
            return outcome._replace(document=count(outcome.document))
        return outcome

    return treat_and_count


class _Ready(NamedTuple):
    """A step that documents can go through."""

    name: str
    treat: Treatment


def fit(folder: epath.Path, steps: Sequence[tuple[str, Step]]) -> None:
    """Let the steps learn what they need from other files, once, and find out early whether their packages are there.

    What was learned lies in `folder`, for any process. Raises DataError.
    """
    (folder / "learned").mkdir(parents=True, exist_ok=True)
    for place, (_, step) in enumerate(steps):
        if isinstance(step, DocumentStep):
            if load_learned(folder, place) is None:
                save_learned(folder, place, step.fit())
            treatment(folder, place, step)
        else:
            step.keys()


def treatment(folder: epath.Path, place: int, step: DocumentStep) -> Callable[[Document], Outcome]:
    """The step as a function, once `fit` is done."""
    learned = load_learned(folder, place)
    assert learned is not None
    return step.start(learned.arrays)


def _ready(folder: epath.Path, place: int, name: str, step: Step) -> _Ready:
    if isinstance(step, CorpusStep):
        learned = load_learned(folder, place)
        assert learned is not None
        return _Ready(name, step.judge(learned.arrays))
    function = treatment(folder, place, step)
    return _Ready(name, lambda number, document: function(document))
