"""The loop: what is measured of the steps."""

from typing import Any

import jax.numpy as jnp
import pytest

from lmjax.train.accounting import Accounting, Cost
from lmjax.train.loop import Hook, MetricsLogger, train


class Clock:
    """Each step takes a second, and what is due after it ten."""

    now = 0.0

    def step(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        self.now += 1.0
        one = jnp.ones(())
        return state, {"loss": (one, one), "skipped": (0 * one, one)}

    def due(self, step: int, state: Any) -> None:
        self.now += 10.0


class Quiet:
    def beat(self, what: str) -> None:
        pass


@pytest.mark.parametrize("log_every", [1, 2, 5])
@pytest.mark.parametrize("start", [0, 7])
def test_a_step_takes_what_it_takes_whatever_is_due_beside_it(start: int, log_every: int, monkeypatch: Any) -> None:
    clock, lines = Clock(), {}
    monkeypatch.setattr("lmjax.train.loop.time.perf_counter", lambda: clock.now)
    zero = Cost(0, 0, 0, 0, 0)
    accounting = Accounting(start_step=start, before=zero, batch=1, per_sample=zero, peak_flops=None)
    logger = MetricsLogger(
        lines.__setitem__, log_every, accounting, max_skipped=1, skipped=0, keep=lambda batches: "nowhere"
    )
    train(
        {},  # type: ignore[arg-type]
        {},
        clock.step,  # type: ignore[arg-type]
        iter(range(100)),
        start_step=start,
        steps=40,
        metrics_logger=logger,
        hooks=[Hook("save", 4, clock.due), Hook("evaluation", 10, clock.due)],
        stop=lambda: False,
        watchdog=Quiet(),  # type: ignore[arg-type]
    )
    took = {step: line["perf/step_time"] for step, line in lines.items() if "perf/step_time" in line}
    assert set(took.values()) == {1.0} and len(took) >= (40 - start) // log_every // 2
