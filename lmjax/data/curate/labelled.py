"""Texts that somebody has labelled, to learn from."""

from collections.abc import Iterator
from typing import Any

from lmjax.data.config import PrepareConfig
from lmjax.data.curate.classifier import Example, Learning
from lmjax.data.curate.hashing import words
from lmjax.data.prepare.sources import list_inputs, read_records
from lmjax.errors import DataError
from lmjax.schema import config_class


@config_class
class Labelled(Learning):
    """Texts of two kinds in files of JSON lines, and how to learn from them."""

    labelled: tuple[str, ...] = ()
    """Files, by glob, of JSON lines: a text, and whether it is of the kind that is looked for."""
    text_key: str = "text"
    label_key: str = "label"
    """true or false, 1 or 0, or a share of judges who say so: from a half on it is."""

    def examples(self) -> Iterator[Example]:
        """Of each text. Raises DataError, naming file and place, for what has no text or no label."""
        for file in list_inputs(self.labelled):
            for number, record in enumerate(read_records((file,), PrepareConfig(inputs=self.labelled)), 1):
                text, label = self._read(record, f"{file.name}, item {number}")
                yield self.example(words(text), label >= 0.5, text)

    def _read(self, record: Any, where: str) -> tuple[str, float]:
        text, label = (record.get(key) if isinstance(record, dict) else None for key in (self.text_key, self.label_key))
        if not isinstance(text, str) or not isinstance(label, bool | int | float) or not 0 <= label <= 1:
            raise DataError(f"{where}: it needs a text under {self.text_key!r} and under {self.label_key!r} true, "
                            "false, or a number from 0 to 1")  # fmt: skip
        return text, label
