"""Functions of single numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def relu_squared(x: jax.Array) -> jax.Array:
    """So et al. 2021 (Primer), arXiv:2109.08668."""
    return jnp.square(jax.nn.relu(x))


def gelu_exact(x: jax.Array) -> jax.Array:
    """x times the normal distribution function (Hendrycks & Gimpel 2016); `gelu` is its tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu_squared": relu_squared,
    "gelu": jax.nn.gelu,
    "gelu_exact": gelu_exact,
    "silu": jax.nn.silu,
}


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Squash smoothly into (-cap, cap) (Gemma 2, arXiv:2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)
