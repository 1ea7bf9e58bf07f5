"""Texts that are there already, judged as those that a model writes: see writing.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lmjax.data.curate.classifier import load_classifier
from lmjax.errors import DataError, one_line
from lmjax.evaluate.tasks import writing
from lmjax.evaluate.tasks.benchmark import Benchmark, prompts
from lmjax.evaluate.tasks.forms import Rolling
from lmjax.evaluate.tasks.prompt import Item, Prompt
from lmjax.evaluate.tasks.results import Result, digest
from lmjax.evaluate.texts import overlap
from lmjax.record import files


def judge(
    texts: epath.PathLike, references: epath.PathLike | None = None, toxicity: epath.PathLike | None = None
) -> Result:
    """Judge the texts of a file: lines of JSON with a `text`, and what else the lines of prompts have; or text, one a
    line, with a reference each on the lines of another file. `toxicity` is the file of a classifier.

    Raises DataError for files that do not fit, and ConfigError where a package is missing.
    """
    overlap.check()
    classifier = None if toxicity is None else load_classifier(toxicity)
    asked = _lines(texts, references)
    answers = [writing.judged(one, one.answer, classifier) for one in asked]
    return Result(asked, answers, digest(asked), writing.of_texts(asked, [one.answer for one in asked]))


def _lines(texts: epath.PathLike, references: epath.PathLike | None) -> Sequence[Prompt]:
    path = files.locate(texts)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        if references is not None:
            raise DataError(f"--references={references}: lines of {path} have their own, as references; leave it out")
        return prompts(Benchmark(path.name, _item, Rolling(), delimiter=""), path.parent)
    written = _text_lines(path)
    compared = [""] * len(written) if references is None else _text_lines(files.locate(references))
    if len(compared) != len(written):
        raise DataError(f"{path} has {len(written)} lines and {references} {len(compared)}; they must be as many")
    pairs = zip(written, compared, strict=True)
    items = [Item("", (text,), references=(reference,) if reference else ()) for text, reference in pairs]
    return [Prompt(number, item, "", "") for number, item in enumerate(items)]


def _item(line: Mapping[str, Any]) -> Item:
    return writing.item({"prompt": "", **line})._replace(choices=(line["text"],))


def _text_lines(path: epath.Path) -> list[str]:
    """Without the newlines; those that are empty count, too."""
    try:
        lines = files.read_bytes(path).decode().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text: {one_line(error)}") from None
    return lines[:-1] if lines[-1] == "" else lines
