"""One cell of a sweep: `python -m launch cell DIR 3` trains it, or goes on with it, and notes how that ended.

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
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import IO, Any

from etils import epath

from launch import manifest
from launch.local import Guard
from launch.manifest import Entry, Manifest
from lmjax.cells import texts
from lmjax.errors import LmjaxError, one_line
from lmjax.process import cluster
from lmjax.record import files
from lmjax.record.jsonl import JsonLines

_LAST_LINE = 300
"""Letters that are kept of what a failed attempt said last."""


def run(directory: str, index: int) -> int:
    """Returns the exit code of the training. Raises ConfigError for a cell that is not there."""
    sweep = manifest.read(directory)
    entry = manifest.entry(sweep, index)
    place = cluster.detect(os.environ)
    process = 0 if place is None else place.process
    root = epath.Path(directory)
    if process == 0:
        note(root / entry.attempts, {"event": "started", "host": socket.gethostname(), "pid": os.getpid()})
    try:
        if process == 0:
            join_wandb(root / entry.workdir, entry.run_id)
        with log(root / entry.log, process) as file:
            code, last = train([sys.executable, "-m", "lmjax", *arguments(sweep, entry, directory)], file)
    except LmjaxError as error:
        code, last = error.exit_code, one_line(error, _LAST_LINE)
        print(f"lmjax: error: {last}", file=sys.stderr)
    if process == 0:
        note(root / entry.attempts, {"event": "ended", "code": code, "last": last})
    return code


def arguments(sweep: Manifest, entry: Entry, directory: str) -> list[str]:
    """Of `lmjax` for a cell; what varies, its size and its budget are keys of its config in wandb already."""
    group = [] if any(text.startswith("tracking.group=") for text in sweep.common) else [f"tracking.group={sweep.name}"]
    own = dict(entry.overrides)
    if entry.trunk is not None:
        own["train.branch_from"] = f"{directory.rstrip('/')}/{sweep.cells[entry.trunk].workdir}@{entry.first_step}"
    settings = [*group, *sweep.common, *texts(own)]
    workdir = f"{directory.rstrip('/')}/{entry.workdir}"
    return ["train", f"--config={sweep.config}", *(f"--config.{text}" for text in settings), f"--workdir={workdir}"]


def join_wandb(workdir: epath.Path, run_id: str) -> None:
    """The same cell is the same run in wandb, wherever its directory lies."""
    with files.reporting(workdir, "write"):
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / "wandb_id").exists():
            files.write_atomically(workdir / "wandb_id", run_id + "\n")


def train(command: list[str], log: IO[bytes] | None) -> tuple[int, str]:
    """(exit code, what it said last on stderr). What it prints comes out here, and in the log."""
    last = [""]

    def pump(source: IO[bytes], target: IO[bytes], remember: bool) -> None:
        for line in source:
            if remember and line.strip():
                last[0] = line.decode(errors="replace").strip()
            for one in (target, log):
                if one is not None:
                    with contextlib.suppress(OSError):  # a full disk, or a reader that has left, must not stop it
                        one.write(line)
                        one.flush()

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
    return (code if code >= 0 else 128 - code), last[0][:_LAST_LINE] if code else ""


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
