"""Signals that ask a run to stop, and the watchdog that ends a run that hangs."""

import faulthandler
import math
import signal
import socket
import threading
import time
from types import FrameType

from lmjax.errors import StallError
from lmjax.process import group
from lmjax.process.ending import exit_now

_TOGETHER_SECONDS = 1.0
"""Signals closer than this are one: Slurm's reach a process and also its parent, which passes them on."""


class Preemption:
    """SIGTERM or SIGINT asks for a checkpoint at the next step boundary; a second one, a second later, exits at once.

        with Preemption() as preemption:
            for step in ...:
                if preemption.requested: save, return PREEMPTED

    Python runs signal handlers only between bytecodes, so not during a compilation of minutes. A thread therefore
    reads the signals from the wake-up pipe, which the C handler fills at any time.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._requested = threading.Event()

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def __enter__(self) -> "Preemption":
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._listener = threading.Thread(target=self._listen, name="lmjax-signals", daemon=True)
        self._listener.start()
        self._old_handlers = [signal.signal(number, self._handle) for number in self._SIGNALS]
        self._old_wakeup = signal.set_wakeup_fd(self._write.fileno())
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in zip(self._SIGNALS, self._old_handlers, strict=True):
            signal.signal(number, handler)
        self._write.close()  # ends the thread, once it has said what it received
        self._listener.join(timeout=1)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested.set()

    def _listen(self) -> None:
        first = math.inf
        with self._read:
            while data := self._read.recv(1):
                if (number := data[0]) not in self._SIGNALS:
                    continue
                name, now = signal.Signals(number).name, time.monotonic()
                if now - first >= _TOGETHER_SECONDS:
                    exit_now(f"second {name}: exit without saving", 128 + number)
                if first == math.inf:
                    first = now
                    self._requested.set()
                    group.say(f"{name}: saving at the next step boundary (again to exit at once)")


class Watchdog:
    """Ends the process with exit code 6 and every thread's stack when `beat` was not called for `timeout` seconds.

    A lost peer or a dead file system otherwise blocks a step for ever. `timeout=None` watches nothing.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._stopped = threading.Event()
        self.beat("start")

    def beat(self, doing: str) -> None:
        """Progress was made; `doing` names what starts now, for the message."""
        self._doing, self._since = doing, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._timeout is not None:
            self.beat("start")
            threading.Thread(target=self._watch, args=(self._timeout,), name="lmjax-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _watch(self, timeout: float) -> None:
        while not self._stopped.wait(min(1.0, timeout / 4)):
            if time.monotonic() - self._since > timeout:
                faulthandler.dump_traceback(all_threads=True)
                exit_now(
                    f"no progress for {timeout:g} s during {self._doing}; the stacks above show where; "
                    "run again to resume from the last checkpoint",
                    StallError.exit_code,
                )
