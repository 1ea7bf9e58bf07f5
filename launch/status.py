"""What the cells of a sweep are at, read from their directories alone: no server, and no JAX."""

import concurrent.futures
import dataclasses
import json
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from etils import epath

from launch import manifest
from launch.manifest import Entry, Manifest
from lmjax.errors import DONE, PREEMPTED
from lmjax.record import files
from lmjax.record.jsonl import parsed

Line = dict[str, Any]

State = Literal["waiting", "running", "silent", "preempted", "done", "failed", "killed"]
SILENT_SECONDS = 900.0
"""Without a new line of metrics, a cell that should run is taken for lost."""
_TAIL_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell."""

    index: int
    name: str
    state: State
    step: int
    steps: int
    loss: float | None
    """The last validation loss, or else the last training loss; nats per token."""
    loss_name: str
    tokens_per_second: float | None
    eta_seconds: float | None
    spent_hours: float
    spent_dollars: float | None
    attempts: int
    why: str
    """Why it is not done, where that is known: exit code and last line."""
    pid: int | None
    """Of the process that started it last."""
    flops: float
    """Of its own steps: those of a branch begin where it leaves its trunk."""
    first_step: int


def rows(directory: epath.PathLike) -> list[Row]:
    """One for each cell. Raises ConfigError for a directory without a sweep."""
    sweep, root = manifest.read(directory), epath.Path(directory)
    with concurrent.futures.ThreadPoolExecutor(32 if files.is_remote(root) else 4) as pool:
        return list(pool.map(lambda entry: row(root, entry), sweep.cells))


def row(root: epath.Path, entry: Entry) -> Row:
    notes, workdir = _lines(root / entry.attempts), root / entry.workdir
    summary, metrics = _json(workdir / "summary.json"), tail(workdir / "metrics.jsonl")
    logged = [line for line in metrics if "event" not in line and "step" in line]
    step = summary["step"] if "step" in summary else logged[-1]["step"] if logged else 0
    spent_hours = _hours(notes, logged)
    state, why = _state(entry, notes, logged, step if summary else None)
    loss_name, loss = _loss(summary, logged)
    pace = _last(logged, "perf/step_time")
    return Row(
        index=entry.index,
        name=entry.name,
        state=state,
        why=why,
        step=step,
        steps=entry.steps,
        loss=loss,
        loss_name=loss_name,
        tokens_per_second=_last(logged, "perf/tokens_per_sec"),
        eta_seconds=(entry.steps - step) * pace if pace and state == "running" else None,
        spent_hours=spent_hours,
        spent_dollars=spent_hours * entry.dollars / entry.hours if entry.dollars and entry.hours else None,
        attempts=len(_started(notes)),
        pid=_started(notes)[-1]["pid"] if notes else None,
        flops=entry.own_flops,
        first_step=entry.first_step,
    )


def _state(entry: Entry, notes: Sequence[Line], logged: Sequence[Line], finished: int | None) -> tuple[State, str]:
    """Where it stands, and why it is not done. `finished` is the step of the summary, where there is one."""
    if finished is not None and finished >= entry.steps:
        return "done", ""
    if not notes:
        return "waiting", "" if entry.trunk is None else f"comes after cell {entry.trunk}"
    last = notes[-1]
    if last["event"] == "started":
        silence = time.time() - max(last["time"], logged[-1]["time"] if logged else 0.0)
        if last["host"] == socket.gethostname() and not _lives(last["pid"]):
            return "killed", "the process is gone"
        return ("silent", f"nothing heard for {silence / 60:.0f} min") if silence > SILENT_SECONDS else ("running", "")
    code, said = last["code"], last["last"]
    if code == PREEMPTED:
        return "preempted", "saved; the same command goes on"
    if code == DONE:
        return "failed", "it ended well, but there is no summary: start it again"
    if code > 128:
        return "killed", f"signal {code - 128}"
    return "failed", f"exit code {code}: {said}" if said else f"exit code {code}"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of somebody else
        return True
    return True


def _started(notes: Sequence[Line]) -> list[Line]:
    return [line for line in notes if line["event"] == "started"]


def _hours(notes: Sequence[Line], logged: Sequence[Line]) -> float:
    """Of all attempts; one without an end counts up to its last line of metrics. Cells that train together share the
    time."""
    seconds = 0.0
    for number, line in enumerate(notes):
        if line["event"] == "started":
            after = notes[number + 1] if number + 1 < len(notes) else (logged[-1] if logged else line)
            seconds += max(0.0, after["time"] - line["time"]) / line.get("together", 1)
    return seconds / 3600


def _loss(summary: Mapping[str, Any], logged: Sequence[Line]) -> tuple[str, float | None]:
    """The newest validation loss, of the whole set where it was taken; without any the newest training loss."""
    for line in (summary, *reversed(logged)):
        for prefix in ("val_full/", "val/"):
            names = [key for key in line if key.startswith(prefix) and key.endswith("/loss")]
            name = next((key for key in names if "/macro/" in key), names[0] if names else None)
            if name is not None:
                return name, math.nan if line[name] is None else line[name]
    return "train/loss", _last(logged, "train/loss")


def _last(lines: Sequence[Line], key: str) -> float | None:
    return next((line[key] for line in reversed(lines) if key in line), None)


# Files ------------------------------------------------------------------------------------------------------------


def tail(path: epath.Path) -> list[Line]:
    """The last lines of a file of JSON lines; empty where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    return _parsed(lines if size <= _TAIL_BYTES else lines[1:])


def _lines(path: epath.Path) -> list[Line]:
    try:
        return _parsed(path.read_bytes().split(b"\n"))
    except OSError:
        return []


def _parsed(lines: Iterable[bytes]) -> list[Line]:
    """Without what is torn: somebody may be writing."""
    return [record for line in lines if (record := parsed(line)) is not None]


def _json(path: epath.Path) -> Line:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


# To look at -------------------------------------------------------------------------------------------------------


def all_done(found: Sequence[Row]) -> bool:
    return all(one.state == "done" for one in found)


def bracket_notes(sweep: Manifest, found: Sequence[Row]) -> Iterator[str]:
    """A line for each bracket whose lowest loss lies at its edge, once all of its cells have ended."""
    brackets: dict[str, list[tuple[float, Row]]] = {}
    for entry, one in zip(sweep.cells, found, strict=True):
        if entry.bracket:
            brackets.setdefault(entry.bracket, []).append((entry.factor, one))
    for members in brackets.values():
        known = ((one.loss, factor) for factor, one in members if one.state == "done" and one.loss is not None)
        losses = [(loss, factor) for loss, factor in known if math.isfinite(loss)]
        if not losses or any(one.state not in ("done", "failed") for _, one in members):
            continue
        best, factors = min(losses)[1], [factor for factor, _ in members]
        if best in (min(factors), max(factors)):
            where = f"cells {members[0][1].index} to {members[-1][1].index}"
            more = "lower" if best == min(factors) else "higher"
            yield f"{where}: the lowest loss is at the edge of the bracket, {best:g} times the rate; try {more} ones"


def headline(found: Sequence[Row]) -> str:
    """`7 of 12 done, 2 running, 1 failed; 58% of the FLOPs; about 4 min to go`."""
    states = Counter(one.state for one in found)
    parts = [f"{states['done']} of {len(found)} done"]
    parts += [f"{states[state]} {state}" for state in get_args(State) if state != "done" and states[state]]
    total = sum(one.flops for one in found)
    trained = sum(one.flops * _part(one) for one in found)
    text = f"{', '.join(parts)}; {trained / total:.0%} of the FLOPs"
    spent = sum(one.spent_hours for one in found)
    return f"{text}; {duration(3600 * spent)} spent" if spent else text


def _part(one: Row) -> float:
    """Of its own steps, those that are done."""
    return min(1.0, max(0, one.step - one.first_step) / (one.steps - one.first_step))


def table(found: Sequence[Row]) -> str:
    """A row a cell."""
    head = ("", "cell", "state", "step", "loss", "tokens/s", "left", "spent", "")
    body = [
        (
            str(one.index),
            one.name,
            one.state,
            f"{one.step:,} of {one.steps:,}",
            "" if one.loss is None else f"{one.loss:.4f}",
            "" if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}",
            "" if one.eta_seconds is None else duration(one.eta_seconds),
            (duration(3600 * one.spent_hours) if one.attempts else "")
            + ("" if one.spent_dollars is None else f" ${one.spent_dollars:,.2f}"),
            one.why,
        )
        for one in found
    ]
    return aligned([head, *body], left={1, 2, 8})


def aligned(lines: Sequence[Sequence[str]], left: set[int]) -> str:
    """Columns as wide as their widest entry, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if place in left else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
