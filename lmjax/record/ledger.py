"""The ledger of a run: which global samples every attempt fed to the model, one line of `ledger.jsonl` per step.

From it follows, or not, that every sample was trained on once and in order, whatever crashes lie between.
"""

import dataclasses
import itertools
import logging
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from lmjax.record import formats
from lmjax.record.jsonl import FORMAT, JsonLines, read_lines

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One step of one attempt: `count` samples from `first_sample` on, with the CRC-32 of their tokens."""

    attempt: int
    step: int
    first_sample: int
    count: int
    crc: int
    stream: str = ""
    """Names the order of samples, which may be changed explicitly; older ledgers do not say."""

    @property
    def data(self) -> tuple[int, int, int]:
        """What the step read."""
        return self.first_sample, self.count, self.crc

    def __str__(self) -> str:
        last = self.first_sample + self.count - 1
        return f"samples {self.first_sample} to {last} (crc {self.crc:08x}) in attempt {self.attempt}"


@dataclasses.dataclass(frozen=True)
class Rollback:
    """Training went back to `step`, and goes on from there behind `skip` samples, from `first_sample` on."""

    step: int
    first_sample: int
    skip: int


class Ledger:
    """Attempts number the starts of a run from 0."""

    def __init__(self, path: epath.PathLike) -> None:
        self._lines = JsonLines(path)
        self._stamp = formats.stamp(FORMAT)

    def record(self, attempt: int, step: int, first_sample: int, count: int, crc: int, stream: str = "") -> None:
        self._lines.write(dataclasses.asdict(Entry(attempt, step, first_sample, count, crc, stream)) | self._stamp)
        self._stamp = {}

    def roll_back(self, rollback: Rollback) -> None:
        self._lines.write({"rollback": dataclasses.asdict(rollback), "time": time.time()})

    def sync(self) -> None:
        """Force what is written to the disk; call before a checkpoint is sealed."""
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()


def row_crcs(tokens_BT: np.ndarray) -> np.ndarray:
    """The CRC-32 of every row, uint32 [B]: what a process says of the rows that it feeds."""
    return np.array([zlib.crc32(row.tobytes()) for row in tokens_BT], np.uint32)


def joined_crc(crcs_B: np.ndarray, row_bytes: int) -> int:
    """The CRC-32 of all rows end to end, each of `row_bytes` bytes, from those of the rows.

    A CRC is affine in what it starts from and what it reads, so crc(ab) = crc(zeros, from crc(a)) ^ crc(zeros) ^ crc(b)
    with as many zeros as b has bytes.
    """
    zeros, joined = bytes(row_bytes), 0
    blank = zlib.crc32(zeros)
    for crc in crcs_B.tolist():
        joined = zlib.crc32(zeros, joined) ^ blank ^ crc
    return joined


def read_ledger(path: epath.PathLike) -> list[Entry]:
    """Every entry in the order written, replays included; a line that is not one is left out with a warning."""
    return [line for line in _read(path) if isinstance(line, Entry)]


def _read(path: epath.PathLike) -> list[Entry | Rollback]:
    """What every step read, and every time that training went back, in the order written."""
    lines = [_line(record) for record in read_lines(path)]
    if foreign := lines.count(None):
        logger.warning("%s: lines that are not a ledger's are left out: %d", path, foreign)
    return [line for line in lines if line is not None]


def _line(record: dict[str, Any]) -> Entry | Rollback | None:
    try:
        line = Rollback(**record["rollback"]) if "rollback" in record else Entry(**record)
    except TypeError:
        return None
    if isinstance(line, Rollback):
        numbers = dataclasses.astuple(line)
    elif isinstance(line.stream, str):
        numbers = (line.attempt, line.step, *line.data)
    else:
        return None
    return line if all(type(number) is int and number >= 0 for number in numbers) else None


def effective_history(path: epath.PathLike) -> list[Entry]:
    """The entries that the current parameters come from, in the order of their steps.

    An attempt that starts at an earlier step than its predecessor reached replaces the steps from there on: the
    parameters that had seen those died with the process. `check_ledger` says whether the replay was the same.
    """
    return _effective(_read(path))[0]


def effective_rollbacks(path: epath.PathLike) -> list[Rollback]:
    """The times that training went back which the current parameters come from, in the order of their steps."""
    return _effective(_read(path))[1] if epath.Path(path).exists() else []


def _effective(lines: list[Entry | Rollback]) -> tuple[list[Entry], list[Rollback]]:
    history: list[Entry] = []
    rollbacks: list[Rollback] = []
    for line in lines:
        if isinstance(line, Rollback):
            history = [kept for kept in history if kept.step <= line.step]
            rollbacks = [*(kept for kept in rollbacks if kept.step < line.step), line]
            continue
        if history and line.attempt != history[-1].attempt:
            history = [kept for kept in history if kept.step < line.step]
        history.append(line)
    return history, rollbacks


def check_ledger(path: epath.PathLike, sealed: Mapping[int, int] | None = None) -> list[str]:
    """What contradicts "every sample once and in order"; empty if nothing does.

    The same samples of a stream must have had the same tokens whenever they were read, and in the effective history
    each step must follow the one before it and start at the sample where that one stopped, or as many later as a
    rollback says; the first starts at sample 0. A batch of another size or another stream, both of which a run may
    change to, changes none of that.
    `sealed` says of checkpoints, `{step: next sample}`, how far the ledger must reach at least.
    """
    problems = []
    seen: dict[tuple[str, int, int], Entry] = {}
    lines = _read(path)
    for entry in (line for line in lines if isinstance(line, Entry)):
        key = (entry.stream, entry.first_sample, entry.count)
        before = seen.setdefault(key, entry)
        if entry.crc != before.crc:
            problems.append(f"step {entry.step} read {entry}, but {before}")
        seen[key] = entry
    history, rollbacks = _effective(lines)
    skipped = {rollback.step: rollback.skip for rollback in rollbacks}
    if history and history[0].first_sample:
        problems.append(f"the first step, {history[0].step}, starts at sample {history[0].first_sample}")
    for before, entry in itertools.pairwise(history):
        if entry.step != before.step + 1:
            problems.append(f"step {entry.step} follows step {before.step}")
        if entry.first_sample != before.first_sample + before.count + skipped.get(before.step, 0):
            problems.append(f"step {entry.step} read {entry} after {before}")
    return problems + list(_not_reached({entry.step: entry for entry in history}, sealed or {}))


def _not_reached(history: Mapping[int, Entry], sealed: Mapping[int, int]) -> Iterator[str]:
    """Sealed steps whose samples the history does not end with."""
    for step, next_sample in sorted(sealed.items()):
        if step not in history:
            yield f"the ledger does not have step {step}, whose checkpoint is sealed"
        elif (found := history[step].first_sample + history[step].count) != next_sample:
            yield f"step {step} ends before sample {found} in the ledger, before sample {next_sample} in its checkpoint"
