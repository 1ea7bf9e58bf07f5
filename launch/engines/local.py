"""The cells of a sweep on this machine: --jobs at a time, the dearest first, the cores shared out between them.

A cell that was preempted, lost a peer or was killed is started again, at most --retries times; one that failed stays
failed, and the others go on. Ctrl-C and SIGTERM let all that run save; the same command goes on with them.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from etils import epath

from launch import status
from launch.job import RETRIED, Hardware, Job
from launch.local import Guard
from lmjax.errors import BUG, DONE, PREEMPTED, ConfigError
from lmjax.record import files

WAITS = True
LAUNCHER = "launcher.json"
_POLL_SECONDS = 0.2
_TELL_SECONDS = 5.0


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--jobs", type=int, metavar="N", help="local: cells at a time; default: one a core")
    parser.add_argument("--retries", type=int, default=2, metavar="N", help="local: of a cell that was killed")


def at_a_time(arguments: argparse.Namespace) -> int:
    """How many jobs run at once, where there are as many."""
    return max(1, arguments.jobs or len(os.sched_getaffinity(0)))


def render(
    name: str, directory: str, jobs: Sequence[Job], hardware: Hardware, arguments: argparse.Namespace
) -> dict[str, str]:
    """Nothing: this engine has no tool beside itself."""
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ConfigError(f"--jobs={arguments.jobs} must be at least 1")
    if arguments.retries < 0:
        raise ConfigError(f"--retries={arguments.retries} must be at least 0")
    return {}


def submit(name: str, directory: str, jobs: Sequence[Job], hardware: Hardware, arguments: argparse.Namespace) -> int:
    """Train all of them; returns 0, 75 when it was stopped, or 1 when a cell failed."""
    cores = sorted(os.sched_getaffinity(0))
    slots = min(at_a_time(arguments), len(jobs))
    shares = [cores[slot::slots] or cores for slot in range(slots)]
    waiting = sorted(jobs, key=lambda job: -job.flops)
    with Guard() as guard, _stopping() as stop, _registered(directory):
        return _Pool(directory, waiting, shares, arguments.retries, guard, stop).run()


def stop(name: str, directory: str, jobs: Sequence[Job]) -> int:
    """Signal the launcher, which has its cells save and starts no more."""
    path = epath.Path(directory) / LAUNCHER
    try:
        host, pid = json.loads(path.read_text())
    except (OSError, ValueError):
        print(f"nothing runs: no launcher has left its name in {path}")
        return DONE
    if host != socket.gethostname():
        raise ConfigError(f"the cells of {directory} run on {host}: stop them there")
    with files.lock(path.parent / ".lock", patience=0) as free:
        if free and not files.is_remote(path):  # it was killed: its number may be another process's by now
            print(f"nothing runs: the launcher that left its name in {path} is gone")
            return DONE
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    print(f"asked the launcher, process {pid}, to end: its cells save first")
    return DONE


@contextlib.contextmanager
def _registered(directory: str) -> Iterator[None]:
    """Leaves this process's name in the sweep while it runs cells."""
    path = epath.Path(directory) / LAUNCHER
    files.write_bytes(path, json.dumps([socket.gethostname(), os.getpid()]).encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


class _Stop:
    """Whether a signal asked to stop."""

    requested = False


@contextlib.contextmanager
def _stopping() -> Iterator[_Stop]:
    stop = _Stop()

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Pool:
    """The cells that run, each on its share of the cores."""

    def __init__(
        self, directory: str, jobs: list[Job], shares: list[list[int]], retries: int, guard: Guard, stop: _Stop
    ) -> None:
        self.directory, self.waiting, self.shares, self.stop = directory, jobs, shares, stop
        self.guard = guard
        self.left = {job.index: retries for job in jobs}
        self.running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
        """By the number of the share of the cores."""
        self.done: set[int] = set()
        self.failed = 0
        self.told = 0.0

    def run(self) -> int:
        asked = False
        while self.running or (self.ready() and not self.stop.requested):
            while len(self.running) < len(self.shares) and not self.stop.requested and (job := self.ready()):
                self.waiting.remove(job)
                self.start(job)
            self.look()
            if self.stop.requested and not asked:  # a second signal would have them leave without saving
                self.end()
                asked = True
            self.tell()
            time.sleep(_POLL_SECONDS)
        self.tell(last=True)
        if self.waiting and not self.stop.requested:
            print(f"{sum(len(job.cells) for job in self.waiting)} cells branch from one that failed, and wait")
        return PREEMPTED if self.stop.requested and (self.waiting or self.failed == 0) else BUG if self.failed else DONE

    def ready(self) -> Job | None:
        """The next to start: nothing that it comes after has still to end."""
        return next((job for job in self.waiting if job.after is None or job.after in self.done), None)

    def start(self, job: Job) -> None:
        slot = next(slot for slot in range(len(self.shares)) if slot not in self.running)
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.shares[slot])  # which the child inherits
        try:
            process = subprocess.Popen(
                job.command,
                env={**os.environ, **job.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the cell's log has it
                stderr=subprocess.DEVNULL,
                process_group=self.guard.group,
            )
        finally:
            os.sched_setaffinity(0, cores)
        self.running[slot] = job, process

    def look(self) -> None:
        """What has ended makes room, and is tried again or counted."""
        for slot, (job, process) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[slot]
            self.done |= self.finished(job, code)
            again = code in RETRIED or code < 0 or code == 128 + signal.SIGKILL
            if self.stop.requested and code == PREEMPTED:
                self.waiting.append(job)
            elif again and self.left[job.index] > 0 and not self.stop.requested:
                self.left[job.index] -= 1
                self.waiting.insert(0, job)
            elif code != DONE:
                self.failed += 1
                self.say_failed(job, code)

    def finished(self, job: Job, code: int) -> set[int]:
        """The cells of a job that ended which are done; of several, some may be where others failed."""
        if code == DONE:
            return set(job.cells)
        if not job.others:
            return set()
        return {row.index for row in status.rows(self.directory) if row.index in job.cells and row.state == "done"}

    def say_failed(self, job: Job, code: int) -> None:
        if job.others:
            cells = ", ".join(map(str, job.cells))
            print(f"of the cells {cells} the first to fail ended with exit code {code}: launch status {self.directory}")
        else:
            print(f"cell {job.index} failed with exit code {code}: launch logs {self.directory} {job.index}")

    def end(self) -> None:
        for _, process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)

    def tell(self, last: bool = False) -> None:
        """A line about all cells: over the one before on a terminal, each minute elsewhere."""
        terminal = sys.stdout.isatty()
        if not last and time.monotonic() - self.told < (_TELL_SECONDS if terminal else 12 * _TELL_SECONDS):
            return
        self.told = time.monotonic()
        line = status.headline(status.rows(self.directory))
        print(f"\r\033[K{line}" if terminal else line, end="\n" if last or not terminal else "", flush=True)
