"""What the files of a work directory say of its run."""

import dataclasses
import json
import logging
from collections.abc import Iterable
from typing import Any

from etils import epath

from lmjax.record import formats
from lmjax.record.jsonl import read_lines
from lmjax.record.tracking import rows_of

logger = logging.getLogger(__name__)

Row = dict[str, Any]
_LATEST = 1e11  # a time in seconds, some thousand years from now
_LARGEST = 2**120  # of a whole number: more than anything costs


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start of the process: its start record, its rows in the order written, and how it ended."""

    start: Row
    rows: list[Row]
    status: str
    ended: float
    """Unix time of its last record."""

    @property
    def reached(self) -> int:
        return max([self.start["step"], *(row["step"] for row in self.rows)])


@dataclasses.dataclass(frozen=True)
class Record:
    """All that is known of a run."""

    workdir: epath.Path
    config: dict[str, Any]
    rows: list[Row]
    """The rows of metrics in the order of their steps, across restarts."""
    attempts: list[Attempt]
    summary: dict[str, Any]
    """Empty until the run is finished, and again once it goes on to more steps."""

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def validation_sets(self) -> list[str]:
        names = (
            key.split("/")[1] for row in self.rows for key in row if key.startswith("val/") and key.count("/") == 2
        )
        return list(dict.fromkeys(names))

    def series(self, key: str) -> list[tuple[int, int, float]]:
        """`(step, tokens, value)` of every row that has it."""
        return [(row["step"], row["tokens"], row[key]) for row in self.rows if key in row]

    def last(self, key: str) -> Any:
        """The newest value of it; None of what was never logged."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)


def read_record(workdir: epath.PathLike) -> Record:
    """Lines of metrics that are no run's, and a summary that is none, are left out with a warning."""
    workdir = epath.Path(workdir)
    summary, config = _read_summary(workdir / "summary.json"), json.loads((workdir / "config.json").read_text())
    metrics = workdir / "metrics.jsonl"
    lines = list(read_lines(metrics)) if metrics.exists() else []
    records = [line for line in lines if _is_sound(line)]
    if len(records) < len(lines):
        logger.warning("%s: lines that are not a run's: %d", metrics, len(lines) - len(records))
    rows = rows_of(records)
    return Record(
        workdir=workdir,
        config={key: value for key, value in config.items() if key != formats.STAMP},
        rows=rows,
        attempts=list(_split_attempts(records)),
        summary={} if rows and summary.get("step", 0) < rows[-1]["step"] else summary,
    )


def _read_summary(path: epath.Path) -> Row:
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text())
        if isinstance(summary, dict) and _is_count(summary.get("step")):
            return {key: value for key, value in summary.items() if key != formats.STAMP}
    except (OSError, ValueError, RecursionError):
        pass
    logger.warning("%s is damaged and is left out of the report", path)
    return {}


def _is_sound(line: Row) -> bool:
    """Whether it is a line as trackers write it, so far as a report needs it."""
    if not _is_number(line.get("time")) or not 0 <= line["time"] <= _LATEST:
        return False
    if line.get("event") == "start":
        parts = (line.get("params", {}), line.get("environment", {}))
        return _is_count(line.get("step")) and all(isinstance(part, dict) for part in parts)
    if "event" in line:
        return line["event"] != "end" or isinstance(line.get("status"), str)
    numbers = (value for key, value in line.items() if not key.startswith("data/"))
    return all(_is_count(line.get(key)) for key in ("step", "tokens", "flops")) and all(map(_is_number, numbers))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST)


def _split_attempts(records: Iterable[Row]) -> Iterable[Attempt]:
    groups: list[list[Row]] = []
    for record in records:
        if record.get("event") == "start":
            groups.append([])
        if groups:
            groups[-1].append(record)
    for number, (start, *rest) in enumerate(groups):
        ends = [record["status"] for record in rest if record.get("event") == "end"]
        last = number == len(groups) - 1
        status = ends[0] if ends else "running or killed" if last else "killed"
        rows = [record for record in rest if "event" not in record]
        yield Attempt(start, rows, status, ended=(rest[-1] if rest else start)["time"])
