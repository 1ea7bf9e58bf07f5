"""How long steps take, and which process holds up the others when one takes far longer than usual."""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

from lmjax.process import group

_STEPS = 128
_LEAST = 16
_TIMES, _SECONDS = 5.0, 1.0
_QUIET_SECONDS = 30.0


class Pace:
    """Tells, with `say`, of a step that takes more than 5 times as long as the median of the last 128, and by a second.

    All processes take the same steps, so one that is late makes them all late. What tells it apart is that it does not
    wait for the others: it says itself how much of the time passed here. Process 0 tells of the others' steps.
    """

    def __init__(self, say: Callable[[str], None] = group.say) -> None:
        self._say = say
        self._seconds: deque[float] = deque(maxlen=_STEPS)
        self._told = -_QUIET_SECONDS
        self._waited = 0.0
        self._compiled = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """One step is taken; the first compiles, and does not count."""
        begin, before, self._waited = time.monotonic(), group.waited(), 0.0
        yield
        if self._compiled:
            self._took(step, time.monotonic() - begin, self._waited + group.waited() - before)
        self._compiled = True

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Meanwhile this process waits for devices."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    def _took(self, step: int, seconds: float, waited: float) -> None:
        if len(self._seconds) >= _LEAST:
            usual = statistics.median(self._seconds)
            if seconds > max(_TIMES * usual, usual + _SECONDS):
                self._tell(step, seconds, seconds - waited, usual)
        self._seconds.append(seconds)

    def _tell(self, step: int, seconds: float, here: float, usual: float) -> None:
        if time.monotonic() - self._told < _QUIET_SECONDS:
            return
        if here > (seconds - usual) / 2:
            what = f"{here:.1f} s of them outside the devices' work: it is this process that is late"
        elif group.is_leader():
            what = f"{seconds - here:.1f} s of them waiting for the devices" + (
                ", or for a process that is late" if group.processes() > 1 else ""
            )
        else:
            return
        self._told = time.monotonic()
        self._say(f"straggler: step {step} took {seconds:.1f} s ({usual:.2g} s is usual), {what}")
