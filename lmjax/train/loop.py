"""The visible loop: dispatch a step, read the one before, do what is due. On a CPU, where the call of a step returns
when it has run, that step is read.

Everything that can be left out (evaluation, samples, checkpoints, profiles) is a `Hook` in a list.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.devices import replicas
from lmjax.errors import NumericalError
from lmjax.metrics import Metrics, finish
from lmjax.process import start_up
from lmjax.process.faults import fault
from lmjax.process.signals import Watchdog
from lmjax.train.accounting import Accounting
from lmjax.train.pace import Pace
from lmjax.train.state import TrainState
from lmjax.train.step import Step
from lmjax.weights import Params

Log = Callable[[int, dict[str, Any]], None]
Keep = Callable[[Sequence[tuple[int, Any]]], str]
"""Writes down the batches of these steps, and says where they are."""


class Hook(NamedTuple):
    """Something to do every so many steps, with the state of that step."""

    name: str
    every: int | None
    run: Callable[[int, TrainState], None]
    at_end: bool = False
    at: tuple[int, ...] = ()
    """Further steps at which it is due, by number."""

    def due(self, step: int, last: int) -> bool:
        return bool(self.every and step % self.every == 0) or (self.at_end and step == last) or step in self.at


class MetricsLogger:
    """Reads a step's metrics, stops a run that only skips, and logs them with the throughput since the last line."""

    def __init__(
        self, log: Log, every: int, accounting: Accounting, *, max_skipped: int, skipped: int, keep: Keep
    ) -> None:
        """`skipped` is how many updates in a row were left out before this attempt."""
        self._log, self._every, self._accounting, self._keep = log, every, accounting, keep
        self._max_skipped, self._skipped = max_skipped, np.asarray(skipped)
        self._spikes = False
        """Whether any of those was a spike."""
        self._left_out: list[tuple[int, Any]] = []
        """The steps whose updates were left out one after another up to now, with their batches."""
        self.resume_clock(accounting.start_step)

    def resume_clock(self, step: int) -> None:
        """Start measuring anew: after compilation, and after anything that is not training."""
        self._since, self._clock = step, time.perf_counter()

    def read(self, step: int, batch: Any, metrics: Metrics) -> None:
        """Raises NumericalError after too many skipped updates in a row; their batches are kept."""
        values = finish(metrics)
        # Metrics of several runs are arrays with a value for each, and so is this count.
        self._skipped = np.where(np.greater(values["skipped"], 0), self._skipped + 1, 0)
        self._spikes |= bool(np.any(values.get("spikes", 0)))
        self._left_out = [*self._left_out, (step, batch)] if self._skipped.max() else []
        if (most := int(self._skipped.max())) > self._max_skipped:
            raise NumericalError(
                f"step {step}: the loss or its gradient was not finite{self._or_spikes()} {most} steps in a row "
                f"(train.max_skipped_in_a_row={self._max_skipped}); look at {self._keep(self._left_out)}; "
                "or lower optimizer.learning_rate"
            )
        if not most:
            self._spikes = False
        if step % self._every:
            return
        line: dict[str, Any] = {**self._accounting.totals(step), **_named(values)}
        if step > self._since:
            line |= self._accounting.rates(step - self._since, time.perf_counter() - self._clock)
        self._log(step, line)
        self.resume_clock(step)

    def _or_spikes(self) -> str:
        return ", or was a spike (train.skip_spikes)," if self._spikes else ""


def _named(values: dict[str, Any]) -> dict[str, Any]:
    optim = {"grad_norm", "lr", "skipped", "spikes", "noise_signal", "noise_trace"}
    return {f"{'optim' if name in optim else 'train'}/{name}": value for name, value in values.items()}


def train(
    state: TrainState,
    frozen: Params,
    train_step: Step,
    batches: Iterator[Any],
    *,
    start_step: int,
    steps: int,
    metrics_logger: MetricsLogger,
    hooks: Iterable[Hook],
    stop: Callable[[], bool],
    watchdog: Watchdog,
) -> tuple[TrainState, int]:
    """Run the steps after `start_step` up to `steps`. Returns the state and the last step done, which is less than
    `steps` when the run was stopped.

    `stop` is asked before every step and before everything that is due after it: once it says so, nothing but the
    state of the newest step counts. It may raise what went wrong in the background. Processes that train together must
    get the same answer.
    """
    hooks, pace, at_once = list(hooks), Pace(), jax.default_backend() == "cpu"
    pending: tuple[int, Any, Metrics] | None = None
    step = start_step
    while step < steps and not stop():
        step += 1
        watchdog.beat(f"step {step}")
        with pace.step(step):
            state, batch = _with_faults(step, state, next(batches))
            state, metrics = train_step(state, frozen, batch)
            if pending is not None:
                with pace.waiting():
                    metrics_logger.read(*pending)
        if step == start_step + 1:  # the first step compiles: keep it out of the throughput
            jax.block_until_ready(metrics)
            _go_on(metrics_logger, step)
        pending = step, batch, metrics

        due = [hook for hook in hooks if hook.due(step, steps)]
        if due or at_once:
            metrics_logger.read(*pending)
            pending = None
        if due:
            _run(due, step, state, stop, watchdog)
            _go_on(metrics_logger, step)
    if pending is not None:
        metrics_logger.read(*pending)
    return state, step


def _run(hooks: Iterable[Hook], step: int, state: TrainState, stop: Callable[[], bool], watchdog: Watchdog) -> None:
    for hook in hooks:
        if stop():
            break
        watchdog.beat(f"{hook.name} at step {step}")
        hook.run(step, state)


def _go_on(metrics_logger: MetricsLogger, step: int) -> None:
    """Train again, after something else: without the memory that it took, or its time."""
    start_up.give_back_memory()
    metrics_logger.resume_clock(step)


def _with_faults(step: int, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
    """The state and the batch of a step as tests want them."""
    name = fault("step", step)
    if name == "nan_grad":
        batch = jax.tree.map(lambda x: x * np.nan if jnp.issubdtype(x.dtype, jnp.floating) else x, batch)
    elif name == "spike":  # whatever comes before, nothing follows but the first token
        batch = jax.tree.map(lambda x: x * 0 if jnp.issubdtype(x.dtype, jnp.integer) else x, batch)
    elif name == "flip":
        state = replicas.with_flipped_bit(state)
    return state, batch
