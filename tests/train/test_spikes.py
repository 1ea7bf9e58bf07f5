"""A spike is what numpy says of the last 128 steps."""

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.train.spikes import WINDOW, judge, none_yet


def test_steps_are_judged_by_those_before_them() -> None:
    rng = np.random.default_rng(0)
    losses, norms = (rng.normal(3.0, 0.1, 400).astype(np.float32) for _ in range(2))
    losses[[10, 70, 300]], norms[[200, 310]] = 9.0, 9.0
    losses[[250, 251]] = np.nan
    step = jax.jit(lambda recent, loss, norm: judge(recent, loss, norm, jnp.isfinite(loss), 6.0))
    recent, found, expected, seen = none_yet(), [], [], np.empty((0, 2))
    for number, pair in enumerate(zip(losses, norms, strict=True)):
        spike, recent = step(recent, *pair)
        if spike:
            found.append(number)
        last = seen[-WINDOW:]
        if np.isfinite(pair[0]):
            if len(seen) >= WINDOW // 2 and (pair > last.mean(0) + 6 * last.std(0, ddof=1)).any():
                expected.append(number)
            seen = np.vstack([seen, pair])
    assert found == expected and {70, 200} <= set(found) and 10 not in found
