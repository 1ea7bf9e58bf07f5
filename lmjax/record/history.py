"""What the files of a work directory say of its run."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from etils import epath

from lmjax.record import formats
from lmjax.record.jsonl import read_lines
from lmjax.record.tracking import read_jsonl

Row = dict[str, Any]


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
    workdir = epath.Path(workdir)
    path = workdir / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    rows, config = read_jsonl(workdir / "metrics.jsonl"), json.loads((workdir / "config.json").read_text())
    return Record(
        workdir=workdir,
        config={key: value for key, value in config.items() if key != formats.STAMP},
        rows=rows,
        attempts=list(_split_attempts(read_lines(workdir / "metrics.jsonl"))),
        summary={} if rows and summary.get("step", 0) < rows[-1]["step"] else summary,
    )


def _split_attempts(records: Iterable[Row]) -> Iterable[Attempt]:
    groups: list[list[Row]] = []
    for record in records:
        if record.get("event") == "start" and {"step", "time"} <= record.keys():
            groups.append([])
        if groups:
            groups[-1].append(record)
    for number, (start, *rest) in enumerate(groups):
        ends = [record["status"] for record in rest if record.get("event") == "end"]
        last = number == len(groups) - 1
        status = ends[0] if ends else "running or killed" if last else "killed"
        rows = [record for record in rest if "event" not in record]
        yield Attempt(start, rows, status, ended=(rest[-1] if rest else start)["time"])
