"""Steps whose loss or gradient norm jumps far above those before are left out."""

import flax.struct
import jax
import jax.numpy as jnp

WINDOW = 128
_LEAST = WINDOW // 2
"""Steps that are seen before any is judged."""


@flax.struct.dataclass
class Recent:
    """The last steps with finite numbers, those that were left out among them: if the level has risen for good, it is
    soon the usual one. W = WINDOW."""

    losses_W: jax.Array
    norms_W: jax.Array
    """Of the gradients."""
    seen: jax.Array
    """int32, how many there were in all."""


def none_yet() -> Recent:
    return Recent(jnp.zeros(WINDOW), jnp.zeros(WINDOW), jnp.zeros((), jnp.int32))


def judge(
    recent: Recent, loss: jax.Array, norm: jax.Array, finite: jax.Array, sigmas: float
) -> tuple[jax.Array, Recent]:
    """(whether this step is a spike, the steps to judge the next one by).

    It is one if its loss or its gradient's norm is more than `sigmas` standard deviations above the mean of the last
    WINDOW steps, as in OLMo-core's SkipStepOptimizer.
    """
    filled_W = jnp.arange(WINDOW) < recent.seen

    def above(window_W: jax.Array, x: jax.Array) -> jax.Array:
        mean = window_W.mean(where=filled_W)
        return x > mean + sigmas * window_W.std(where=filled_W, ddof=1)

    spike = finite & (recent.seen >= _LEAST) & (above(recent.losses_W, loss) | above(recent.norms_W, norm))
    place = recent.seen % WINDOW

    def put(window_W: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(finite, window_W.at[place].set(x), window_W)

    seen = recent.seen + finite.astype(jnp.int32)
    return spike, Recent(put(recent.losses_W, loss), put(recent.norms_W, norm), seen)
