"""Matrix products of 16-bit arrays whose results are float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def product(dot: Callable[[jax.Array, jax.Array, Any], jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """`dot(x, y, float32)`, where `dot(x, y, dtype)` is a product whose result has that type.

    The gradients are products in the type of x and y: what flows back is rounded to it first, as fused attention
    kernels do. By jax's own rule they would be products of float32 by float32, for which accelerators have no fast
    units.
    """
    if x.dtype == jnp.float32:
        return dot(x, y, jnp.float32)

    @jax.custom_vjp
    def in_float32(x: jax.Array, y: jax.Array) -> jax.Array:
        return dot(x, y, jnp.float32)

    def backward(factors: tuple[jax.Array, jax.Array], gradient: jax.Array) -> Any:
        _, gradients = jax.vjp(lambda x, y: dot(x, y, x.dtype), *factors)
        return gradients(gradient.astype(x.dtype))

    in_float32.defvjp(lambda x, y: (in_float32(x, y), (x, y)), backward)
    return in_float32(x, y)


def einsum(letters: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` as such a product."""
    return product(lambda x, y, dtype: jnp.einsum(letters, x, y, preferred_element_type=dtype), x, y)
