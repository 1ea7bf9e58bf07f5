"""The visible loop: dispatch a step, read the one before, do what is due.

Everything that can be left out (evaluation, samples, checkpoints, profiles) is a `Periodic` in a list.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import NumericalError
from lmjax.metrics import Metrics, finish
from lmjax.process.faults import fault
from lmjax.process.signals import Watchdog
from lmjax.train.accounting import Accounting
from lmjax.train.state import TrainState
from lmjax.train.step import Step
from lmjax.weights import Params

Log = Callable[[int, dict[str, Any]], None]


class Periodic(NamedTuple):
    """Something to do every so many steps, with the state of that step."""

    name: str
    every: int | None
    action: Callable[[int, TrainState], None]
    at_end: bool = False
    at: tuple[int, ...] = ()
    """Further steps, by number."""

    def due(self, step: int, last: int) -> bool:
        return bool(self.every and step % self.every == 0) or (self.at_end and step == last) or step in self.at


class Reader:
    """Reads a step's metrics, stops a run that only skips, and logs with the throughput since the last line."""

    def __init__(self, log: Log, every: int, accounting: Accounting, *, max_skipped: int, skipped: int) -> None:
        """`skipped` is how many updates in a row were left out before this attempt."""
        self._log, self._every, self._accounting = log, every, accounting
        self._max_skipped, self._skipped = max_skipped, np.asarray(skipped)
        self.resume_clock(accounting.start)

    def resume_clock(self, step: int) -> None:
        """Start measuring anew: after compilation, and after anything that is not training."""
        self._since, self._clock = step, time.perf_counter()

    def read(self, step: int, metrics: Metrics) -> None:
        """Raises NumericalError after too many skipped updates in a row."""
        values = finish(metrics)
        self._skipped = np.where(
            np.greater(values["skipped"], 0), self._skipped + 1, 0
        )  # of each run, where many train
        if (most := int(self._skipped.max())) > self._max_skipped:
            raise NumericalError(
                f"step {step}: the loss or its gradient was not finite {most} steps in a row "
                f"(train.max_skipped_in_a_row={self._max_skipped}); lower optimizer.learning_rate or look at the data"
            )
        if step % self._every:
            return
        line: dict[str, Any] = {**self._accounting.totals(step), **_named(values)}
        if step > self._since:
            line |= self._accounting.rates(step - self._since, time.perf_counter() - self._clock)
        self._log(step, line)
        self.resume_clock(step)


def _named(values: dict[str, Any]) -> dict[str, Any]:
    optim = {"grad_norm", "lr", "skipped", "noise_signal", "noise_trace"}
    return {f"{'optim' if name in optim else 'train'}/{name}": value for name, value in values.items()}


def train(
    state: TrainState,
    frozen: Params,
    step: Step,
    batches: Iterator[Any],
    *,
    start: int,
    steps: int,
    reader: Reader,
    periodic: Iterable[Periodic],
    stop: Callable[[], bool],
    watchdog: Watchdog,
) -> tuple[TrainState, int]:
    """Run steps `start` to `steps`; returns the state and the last step done, less than `steps` when stopped.

    `stop` is asked before every step and before everything that is due after it: once it says so, nothing but the
    state of the newest step counts. It may raise what went wrong in the background. Processes that train together must
    get the same answer.
    """
    periodic = list(periodic)
    pending: Metrics | None = None
    reached = start
    while reached < steps and not stop():
        reached += 1
        watchdog.beat(f"step {reached}")
        batch = next(batches)
        if fault("step", reached) == "nan_grad":
            batch = jax.tree.map(lambda x: x * np.nan if jnp.issubdtype(x.dtype, jnp.floating) else x, batch)
        state, metrics = step(state, frozen, batch)
        if pending is not None:
            reader.read(reached - 1, pending)
        if reached == start + 1:  # the first step compiles: keep it out of the throughput
            jax.block_until_ready(metrics)
            reader.resume_clock(reached)
        pending = metrics

        due = [action for action in periodic if action.due(reached, steps)]
        if due:
            reader.read(reached, pending)
            pending = None
            for action in due:
                if stop():
                    break
                watchdog.beat(f"{action.name} at step {reached}")
                action.action(reached, state)
            reader.resume_clock(reached)
    if pending is not None:
        reader.read(reached, pending)
    return state, reached
