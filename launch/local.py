"""Several processes on this machine's CPU cores, as they would run on several machines: to try things out, and to test.

Each is told its place by LMJAX_COORDINATOR, LMJAX_PROCESSES and LMJAX_PROCESS_ID, and gets its own fake devices. Their
output comes line by line with `[process]` before it. SIGTERM and Ctrl-C go to all of them. When one ends other than
well the others have `--grace` seconds to end, too. The exit code is that of the cause: 75 if any was preempted (nothing
is lost: run it again), otherwise that of the first to fail (128 + n for signal n) with anything but the 6 of those who
lost another process, and 6 where all that failed ended with it. Nothing outlives this program, killed or not.
"""

import argparse
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO

from lmjax.errors import DONE, PREEMPTED, ConfigError, StallError

_POLL_SECONDS = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=_positive, required=True, metavar="N")
    parser.add_argument("--devices-per-process", type=_positive, default=1, metavar="N", help="fake CPU devices")
    parser.add_argument("--grace", type=float, default=20, metavar="SECONDS", help="from a failure to SIGKILL")


def _positive(text: str) -> int:
    if not text.isdigit() or text == "0":
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def launch(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    """Run `command` in every process and wait for them; returns the exit code."""
    coordinator = f"localhost:{_free_port()}"
    environments = [
        environment(os.environ, coordinator, process, arguments.processes, arguments.devices_per_process)
        for process in range(arguments.processes)
    ]
    with Guard() as guard:
        try:
            children = [Child(command, variables, number, guard) for number, variables in enumerate(environments)]
        except OSError as error:
            print(f"launch: error: cannot start {command[0]}: {error.strerror}; is it on the PATH?", file=sys.stderr)
            return ConfigError.exit_code
        _forward_signals(children)
        ended = _wait(children, arguments.grace)
    for child in children:
        child.drain()
    code = exit_code([code for _, code in ended])
    if code != DONE:
        number, first = next((number, one) for number, one in ended if exit_code([one]) == code)
        print(f"launch: process {number} was the first not to end well ({_described(first)})", file=sys.stderr)
    return code


def environment(
    base: Mapping[str, str], coordinator: str, process: int, processes: int, devices: int
) -> dict[str, str]:
    """The variables of one process."""
    return {
        **base,
        "LMJAX_COORDINATOR": coordinator,
        "LMJAX_PROCESSES": str(processes),
        "LMJAX_PROCESS_ID": str(process),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),  # goes before XLA_FLAGS
        "PYTHONUNBUFFERED": "1",
    }


def exit_code(codes: Sequence[int]) -> int:
    """One code for all, from those of the processes in the order in which they ended."""
    if PREEMPTED in codes:
        return PREEMPTED
    failed = [code for code in codes if code != DONE] or [DONE]
    cause = next((code for code in failed if code != StallError.exit_code), failed[0])
    return cause if cause >= 0 else 128 - cause


def _described(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


class Guard:
    """A process group that all processes are in, so that Ctrl-C reaches them through us alone, with one of our own that
    kills the group when its standard input closes: however we end, nothing is left."""

    def __enter__(self) -> "Guard":
        command = ["/bin/sh", "-c", "read -r line; kill -KILL 0"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
        self.group = self._process.pid
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Child:
    """A process whose output is passed on."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], number: int, guard: Guard) -> None:
        self.number = number
        self.process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=guard.group,
        )
        self._pumps = [
            threading.Thread(target=_pump, args=(source, target, f"[{number}] "), daemon=True)
            for source, target in ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        ]
        for pump in self._pumps:
            pump.start()

    def drain(self) -> None:
        """Wait for the last lines; a pipe that somebody outside the group still holds open is not waited for."""
        for pump in self._pumps:
            pump.join(timeout=2)


def _pump(source: IO[str], target: IO[str], prefix: str) -> None:
    with source, contextlib.suppress(BrokenPipeError):  # when our reader has left, as `| head` does, so do we
        for line in source:
            target.write(prefix + line.rstrip("\n") + "\n")
            target.flush()


def _forward_signals(children: Sequence[Child]) -> None:
    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)


def _wait(children: Sequence[Child], grace: float) -> list[tuple[int, int]]:
    """(number, exit code) in the order in which the processes ended. What is left `grace` seconds after one did not end
    well is killed."""
    running, deadline = list(children), math.inf
    ended: list[tuple[int, int]] = []
    killed: set[int] = set()  # by us: then what they end with is no cause
    while running:
        looked = [(child, child.process.poll()) for child in running]
        running = [child for child, code in looked if code is None]
        news = causes_first(
            [
                (child.number, StallError.exit_code if child.number in killed else code)
                for child, code in looked
                if code is not None
            ]
        )
        ended += news
        if any(code != DONE for _, code in news):
            deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            for child in running:
                child.process.kill()
            killed |= {child.number for child in running}
        time.sleep(_POLL_SECONDS)
    return ended


def causes_first(ended: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of processes seen to have ended at once, those that only lost another come last."""
    return sorted(ended, key=lambda one: one[1] == StallError.exit_code)


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
