"""Learning-rate schedules: pure functions `(step, hyper) -> multiplier in [0, 1]` of the peak learning rate.

Every number is a traced array, so that runs with different warmups and horizons share one compiled program; hence
`jnp.where` and `jnp.clip` instead of Python branches. Update `step` (counted from 0) uses the multiplier at `step`:

    warmup   updates 0 .. warmup-1 rise linearly, (step + 1) / warmup: the first is not wasted at zero, the last is at
             the peak. Warmup 0 starts at the peak.
    decay    is measured in `steps`, the horizon: the multiplier reaches `final_fraction` at step `steps`, one after
             the last update, which therefore is not wasted at zero either. Beyond the horizon it stays there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Hyper = dict[str, jax.Array]  # name -> float32 scalar (seed: uint32); built by config.hyper
Schedule = Callable[[jax.Array, Hyper], jax.Array]


def warmup(step: jax.Array, hyper: Hyper) -> jax.Array:
    return jnp.clip((step + 1) / jnp.maximum(hyper["warmup"], 1), 0, 1)


def progress(step: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """Where `step` lies between `start` (0) and `end` (1), clipped to [0, 1]; the two may coincide."""
    return jnp.clip((step - start) / jnp.maximum(end - start, 1), 0, 1)


def fall(fraction: jax.Array, hyper: Hyper) -> jax.Array:
    """A line that falls from 1 at fraction 0 to `final_fraction` at fraction 1."""
    return 1 - (1 - hyper["final_fraction"]) * fraction


def constant(step: jax.Array, hyper: Hyper) -> jax.Array:
    """The peak after warmup; `final_fraction` has no part in it."""
    return warmup(step, hyper)


def linear(step: jax.Array, hyper: Hyper) -> jax.Array:
    """A straight line from the end of warmup to `final_fraction`."""
    return warmup(step, hyper) * fall(progress(step, hyper["warmup"], hyper["steps"]), hyper)


def cosine(step: jax.Array, hyper: Hyper) -> jax.Array:
    """Half a cosine from the end of warmup to `final_fraction` (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    done = progress(step, hyper["warmup"], hyper["steps"])
    return warmup(step, hyper) * fall((1 - jnp.cos(jnp.pi * done)) / 2, hyper)


def inverse_sqrt(step: jax.Array, hyper: Hyper) -> jax.Array:
    """sqrt(warmup / (step + 1)) after warmup (Vaswani et al. 2017, arXiv:1706.03762, section 5.3).

    It needs no horizon; `final_fraction` is its floor.
    """
    falling = jnp.sqrt(jnp.maximum(hyper["warmup"], 1) / (step + 1))
    return warmup(step, hyper) * jnp.clip(falling, hyper["final_fraction"], 1)


def wsd(step: jax.Array, hyper: Hyper) -> jax.Array:
    """Warmup, stable, decay (a trapezoid): the peak until the last `decay_fraction` of the steps, then a line down.

    Hu et al. 2024, arXiv:2404.06395.
    """
    return warmup(step, hyper) * fall(_decay_progress(step, hyper), hyper)


def wsd_sqrt(step: jax.Array, hyper: Hyper) -> jax.Array:
    """A `wsd` that decays as 1 - sqrt(progress), which ends lower (Hägele et al. 2024, arXiv:2405.18392)."""
    return warmup(step, hyper) * fall(jnp.sqrt(_decay_progress(step, hyper)), hyper)


def _decay_progress(step: jax.Array, hyper: Hyper) -> jax.Array:
    return progress(step, hyper["steps"] * (1 - hyper["decay_fraction"]), hyper["steps"])


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
    "linear": linear,
    "wsd": wsd,
    "wsd_sqrt": wsd_sqrt,
}
