"""Adafactor's second moment: a row and a column instead of a matrix (Shazeer & Stern 2018, arXiv:1804.04235)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmjax.weights import Weight

MIN_FACTORED = 128  # as in optax: a smaller side saves little memory and loses much
DECAY_EXPONENT = 0.8
EPSILON = 1e-30


class FactoredState(NamedTuple):
    updates: jax.Array
    """int32, how many were made."""
    moments: tuple[jax.Array, ...]
    """Mean squared gradients: (over the outputs, over the inputs), or (of every entry,) of a small weight."""


def scale_by_factored_rms(weight: Weight) -> optax.GradientTransformation:
    """Divide by the root of the running mean square of one unstacked weight, factored (the paper's algorithm 4).

    What is a row and what is a column follows from the declaration: all inputs against all outputs, so that a
    projection of shape [embed, heads, head_dim] factors however small its heads are.
    """
    inputs = tuple(range(len(weight.in_axes)))
    outputs = tuple(range(len(inputs), len(weight.shape)))
    factored = min(weight.fan_in, math.prod(weight.shape) // weight.fan_in) >= MIN_FACTORED

    def moments(squares: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(squares.mean(axes, keepdims=True) for axes in (outputs, inputs)) if factored else (squares,)

    def init(params: jax.Array) -> FactoredState:
        return FactoredState(jnp.zeros((), jnp.int32), moments(jnp.zeros_like(params)))

    def update(updates: jax.Array, state: FactoredState, params: Any = None) -> tuple[jax.Array, FactoredState]:
        del params
        decay = 1 - (state.updates + 1.0) ** -DECAY_EXPONENT  # zero at the first update: no bias to correct
        squares = moments(updates**2 + EPSILON)
        running = tuple(decay * old + (1 - decay) * new for old, new in zip(state.moments, squares, strict=True))
        factors = (running[0] / running[0].mean(), running[1]) if factored else running
        for factor in factors:
            updates = updates * jax.lax.rsqrt(factor)
        return updates, FactoredState(state.updates + 1, running)

    return optax.GradientTransformation(init, update)
