"""How far `prepare` is: a bar on a terminal, a line now and then in a log."""

import contextlib
import sys
import time
from collections.abc import Iterator

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts of what was done; silent."""

    def __init__(self, total_bytes: int):
        self.total_bytes = total_bytes
        self.read_bytes = 0
        self.documents = 0
        self.tokens = 0
        self._started = time.monotonic()

    def read(self, n_bytes: int) -> None:
        """`n_bytes` more were read from the input files."""
        self.read_bytes += n_bytes

    def encoded(self, documents: int, tokens: int) -> None:
        """So much more was encoded."""
        self.documents += documents
        self.tokens += tokens
        self.show()

    def show(self) -> None:
        """Tell whoever looks."""

    def describe(self) -> str:
        """The counts and the speed since the start."""
        rate = self.tokens / max(time.monotonic() - self._started, 1e-9)
        return f"{self.documents:,} documents, {self.tokens:,} tokens, {rate / 1e6:.2f} M tokens/s"

    @property
    def fraction(self) -> float:
        """The fraction of the input files' bytes that was read."""
        return min(1.0, self.read_bytes / max(self.total_bytes, 1))


class _Lines(Progress):
    """A line to stderr every ten seconds."""

    def __init__(self, total_bytes: int):
        super().__init__(total_bytes)
        self._last = time.monotonic()

    def show(self) -> None:
        if time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"encoding {self.fraction:.0%}: {self.describe()}", file=sys.stderr)


class _Bar(Progress):
    """A bar on stderr."""

    def __init__(self, total_bytes: int):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        super().__init__(total_bytes)
        columns = (TextColumn("encoding"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self.bar.add_task("", total=total_bytes)

    def show(self) -> None:
        self.bar.update(self._task, completed=self.read_bytes, description=self.describe())


@contextlib.contextmanager
def showing(total_bytes: int, wanted: bool) -> Iterator[Progress]:
    """A Progress for reading `total_bytes`, shown as fits where stderr goes, closed with a line."""
    if not wanted:
        yield Progress(total_bytes)
        return
    if sys.stderr.isatty():
        progress: Progress = _Bar(total_bytes)
        with progress.bar:  # type: ignore[attr-defined]
            yield progress
    else:
        progress = _Lines(total_bytes)
        yield progress
    print(f"encoded {progress.describe()}", file=sys.stderr)
