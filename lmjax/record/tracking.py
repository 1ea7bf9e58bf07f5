"""Where numbers go: metrics.jsonl is the truth, the console and wandb are views of it that may fail.

    {"event": "start", "time": ..., "step": 0, ...}              one per attempt; "step" is where it (re)starts
    {"step": 10, "time": ..., "tokens": 81920, "train/loss": 5.1}   one per log step
    {"event": "summary", ...}  {"event": "end", "status": "finished"}
    {"event": "rollback", "step": 20, ...}                       training went back to this step

Lines of an earlier attempt beyond the step that a later one started from count no more.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

from etils import epath

from lmjax.errors import LmjaxError
from lmjax.process.redact import redact
from lmjax.record import formats
from lmjax.record.jsonl import FORMAT, JsonLines, read_lines

logger = logging.getLogger(__name__)
Status = Literal["finished", "preempted", "diverged", "failed"]


class Tracker(Protocol):
    """Raises LmjaxError only if training must stop; any other failure is the tracker's own."""

    def start(self, info: Mapping[str, Any]) -> None:
        """An attempt begins. `info["step"]` is the step it starts from, `info["steps"]` the last one planned."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of one step, `tokens` and `flops` among them."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers of the run."""

    def close(self, status: Status) -> None:
        """The attempt ends."""


class Trackers:
    """Several trackers as one. A view that fails is dropped with one warning; training goes on."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._trackers = list(trackers)

    def start(self, info: Mapping[str, Any]) -> None:
        clean = redact(info)
        self._each(lambda tracker: tracker.start(clean))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.log(step, values))

    def summary(self, values: Mapping[str, Any]) -> None:
        clean = redact(values)
        self._each(lambda tracker: tracker.summary(clean))

    def close(self, status: Status) -> None:
        self._each(lambda tracker: tracker.close(status))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except LmjaxError:
                raise
            except Exception as error:
                self._trackers.remove(tracker)
                logger.warning("%s failed and is off from here on: %r", type(tracker).__name__, error)


def read_jsonl(path: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in the order of their steps, one per step, across restarts.

    A later line of the same step overrides the values it repeats, and an attempt overrides whatever earlier ones
    logged after the step that it started from.
    """
    return rows_of(read_lines(path))


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`read_jsonl` of records that have been read."""
    rows: dict[int, dict[str, Any]] = {}
    for record in records:
        step = record.get("step")
        if type(step) is not int:
            continue
        if record.get("event") in ("start", "rollback"):
            rows = {earlier: row for earlier, row in rows.items() if earlier <= step}
        elif "event" not in record:
            rows.setdefault(step, {}).update(record)
    return [rows[step] for step in sorted(rows)]


def read_events(path: epath.PathLike) -> list[dict[str, Any]]:
    """The start, summary and end records of metrics.jsonl in the order they were written."""
    return [record for record in read_lines(path) if "event" in record]


class JsonlTracker:
    """metrics.jsonl: everything that was logged, by every attempt."""

    def __init__(self, path: epath.PathLike) -> None:
        self._lines = JsonLines(path)

    def start(self, info: Mapping[str, Any]) -> None:
        self._lines.write({"event": "start", "time": time.time(), **info, **formats.stamp(FORMAT)})

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._lines.write({"step": step, "time": time.time(), **values})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._lines.write({"event": "summary", "time": time.time(), **values})

    def roll_back(self, step: int, values: Mapping[str, Any]) -> None:
        self._lines.write({"event": "rollback", "time": time.time(), "step": step, **values})

    def sync(self) -> None:
        self._lines.sync()

    def close(self, status: Status) -> None:
        self._lines.write({"event": "end", "time": time.time(), "status": status})
        self._lines.close()
