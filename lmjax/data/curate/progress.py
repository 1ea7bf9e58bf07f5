"""How far a curation is: one line on a terminal, a line now and then in a log."""

import contextlib
import sys
import time
from types import TracebackType

from lmjax.data.curate.account import Count

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_UPDATES = 0.2


class Progress(contextlib.AbstractContextManager["Progress"]):
    """Counts of the stage that is being worked on, shown on stderr if wanted."""

    def __init__(self, wanted: bool, stages: list[str]):
        self._wanted, self._stages = wanted, stages
        self._terminal = wanted and sys.stderr.isatty()
        self._shown = time.monotonic()
        self.start(0, 1)

    def start(self, stage: int, total: int) -> None:
        """Stage number `stage`, reading being 0, begins; it has `total` parts."""
        self._stage, self._total, self._done = stage, max(1, total), 0
        self._read: Count = [0, 0]
        self._kept: Count = [0, 0]
        self._began = time.monotonic()

    def read(self, parts: int) -> None:
        """So many parts more are done."""
        self._done += parts

    def add(self, read: Count, kept: Count) -> None:
        """So many documents more went in, and came out."""
        for total, part in ((self._read, read), (self._kept, kept)):
            total[0] += part[0]
            total[1] += part[1]
        wait = _SECONDS_BETWEEN_UPDATES if self._terminal else _SECONDS_BETWEEN_LINES
        if self._wanted and time.monotonic() - self._shown > wait:
            self._shown = time.monotonic()
            print(self.line(), end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def line(self) -> str:
        """`2/4 near_duplicates 45%: 12,345 documents, 678 documents/s, 9.1 MB/s, 83.2% of bytes kept`"""
        seconds = max(time.monotonic() - self._began, 1e-9)
        documents, size = self._read
        return (
            f"{self._control}{self._stage}/{len(self._stages) - 1} {self._stages[self._stage]} "
            f"{min(1.0, self._done / self._total):.0%}: {documents:,} documents, {documents / seconds:,.0f} "
            f"documents/s, {size / seconds / 1e6:.1f} MB/s, {self._kept[1] / max(1, size):.1%} of bytes kept"
        )

    @property
    def _control(self) -> str:
        return "\r\x1b[K" if self._terminal else ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            print(self._control, end="", file=sys.stderr, flush=True)
