"""Cells of a sweep: `python -m launch cell DIR 3` trains one, or goes on with it, and notes how that ended; `python -m
launch cell DIR 3,4,5` trains them together, through one step.

`DIR/attempts/0003.jsonl` has a line when an attempt starts and one when it ends; `DIR/logs/0003.log` has what it
printed (of a sweep in a bucket the engine's own tool has that). SIGTERM and Ctrl-C reach the training, which saves and
ends with 75. On several hosts each runs this command, and process 0 alone takes notes.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, Any

from etils import epath

from launch import manifest
from launch.local import Guard
from launch.manifest import Entry, Manifest
from lmjax.cells import texts
from lmjax.errors import LmjaxError, one_line
from lmjax.process import cluster, labels
from lmjax.record import files
from lmjax.record.jsonl import JsonLines

_LAST_LINE = 300
"""Letters that are kept of what a failed attempt said last."""


def run(directory: str, indices: Sequence[int]) -> int:
    """Returns the exit code of the training. Raises ConfigError for a cell that is not there."""
    sweep = manifest.read(directory)
    entries = [manifest.entry(sweep, index) for index in indices]
    place = cluster.detect(os.environ)
    process = 0 if place is None else place.process
    root = epath.Path(directory)
    with contextlib.ExitStack() as stack:
        cells = {
            epath.Path(entry.workdir).name: Cell(root, entry, process, stack, together=len(entries))
            for entry in entries
        }
        try:
            if process == 0:
                for entry in entries:
                    join_wandb(root / entry.workdir, entry.run_id)
            code = train([sys.executable, "-m", "lmjax", *arguments(sweep, entries, directory)], cells)
            said = None
        except LmjaxError as error:
            code, said = error.exit_code, one_line(error, _LAST_LINE)
            print(f"lmjax: error: {said}", file=sys.stderr)
        for cell in cells.values():
            cell.end(code, said)
    return code


class Cell:
    """What is noted of a cell as it trains: its log, and how its attempt ended."""

    def __init__(
        self, root: epath.Path, entry: Entry, process: int, stack: contextlib.ExitStack, *, together: int
    ) -> None:
        self._attempts = root / entry.attempts if process == 0 else None
        self._last, self._ended = "", False
        shared = {"together": together} if together > 1 else {}
        self._note({"event": "started", "host": socket.gethostname(), "pid": os.getpid(), **shared})
        self._log = stack.enter_context(log(root / entry.log, process))

    def hear(self, line: bytes, *, error: bool) -> None:
        """A line that it printed, on stderr where it is an `error`."""
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk must not stop it
                self._log.write(line)
                self._log.flush()
        text = line.decode(errors="replace").strip()
        if error and (ended := labels.ENDED.fullmatch(text)):
            self.end(int(ended[1]))
        elif error and text:
            self._last = text

    def end(self, code: int, said: str | None = None) -> None:
        """Its attempt ended; where it did before, among others that went on, that stands."""
        if not self._ended:
            self._ended = True
            last = said if said is not None else self._last[:_LAST_LINE] if code else ""
            self._note({"event": "ended", "code": code, "last": last})

    def _note(self, values: Mapping[str, Any]) -> None:
        if self._attempts is not None:
            note(self._attempts, values)


def arguments(sweep: Manifest, entries: Sequence[Entry], directory: str) -> list[str]:
    """Of `lmjax` for cells; what varies, its size and its budget are keys of its config in wandb already."""
    place = directory.rstrip("/")
    group = [] if any(text.startswith("tracking.group=") for text in sweep.common) else [f"tracking.group={sweep.name}"]
    shared = [f"--config={sweep.config}", *(f"--config.{text}" for text in [*group, *sweep.common])]
    own = [
        [*(f"--config.{text}" for text in texts(overrides(sweep, entry, place))), f"--workdir={place}/{entry.workdir}"]
        for entry in entries
    ]
    if len(own) == 1:
        return ["train", *shared, *own[0]]
    return ["train", *shared, *(word for words in own for word in ["--", *words])]


def overrides(sweep: Manifest, entry: Entry, place: str) -> dict[str, Any]:
    """The cell's own settings, those of a branch with its trunk's work directory in the sweep's `place`."""
    if entry.trunk is None:
        return entry.overrides
    return entry.overrides | {"train.branch_from": f"{place}/{sweep.cells[entry.trunk].workdir}@{entry.first_step}"}


def join_wandb(workdir: epath.Path, run_id: str) -> None:
    """The same cell is the same run in wandb, wherever its directory lies."""
    with files.reporting(workdir, "write"):
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / "wandb_id").exists():
            files.write_atomically(workdir / "wandb_id", run_id + "\n")


def train(command: list[str], cells: Mapping[str, Cell]) -> int:
    """The exit code. What it prints comes out here, and is heard by the cell whose label it has; by all without one."""

    def pump(source: IO[bytes], target: IO[bytes], error: bool) -> None:
        for line in source:
            labelled = labels.LABELLED.match(line.decode(errors="replace")) if len(cells) > 1 else None
            cell = cells.get(labelled[1]) if labelled else None
            if labelled and cell:
                cell.hear(labelled[2].encode(), error=error)
            else:
                for one in cells.values():
                    one.hear(line, error=error)
            with contextlib.suppress(OSError):  # a reader that has left must not stop it
                target.write(line)
                target.flush()

    with Guard() as guard:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=guard.group,
        )
        assert process.stdout is not None and process.stderr is not None

        def forward(number: int, frame: FrameType | None) -> None:
            process.send_signal(signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, forward)
        pumps = [
            threading.Thread(target=pump, args=(process.stdout, sys.stdout.buffer, False), daemon=True),
            threading.Thread(target=pump, args=(process.stderr, sys.stderr.buffer, True), daemon=True),
        ]
        for one in pumps:
            one.start()
        code = process.wait()
        for one in pumps:
            one.join(timeout=2)  # a pipe that somebody else still holds open is not waited for
    return code if code >= 0 else 128 - code


def note(path: epath.Path, values: Mapping[str, Any]) -> None:
    """Append a line, with the time. What cannot be written is said, and stops nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = JsonLines(path)
        lines.write({"time": time.time(), **values})
        lines.close()
    except (OSError, ValueError) as error:
        print(f"launch: warning: {path}: {one_line(error)}", file=sys.stderr)


@contextlib.contextmanager
def log(path: epath.Path, process: int) -> Iterator[IO[bytes] | None]:
    """The file to append to; None in a bucket, where nothing can be appended to."""
    if files.is_remote(path):
        yield None
        return
    path = path if process == 0 else path.with_suffix(f".{process}.log")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115
    except OSError as error:
        print(f"launch: warning: {path}: {one_line(error)}", file=sys.stderr)
        yield None
        return
    with file:
        yield file
