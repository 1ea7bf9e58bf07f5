"""How frozen weights are held: as they were, rounded, or quantised.

Matrices and tables are made small; scales and biases, and what is multiplied in float32 whatever the model computes in,
stay float32. A new way is one function and one line in `STORAGES`.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lmjax.weights import Params, Spec, Weight, map_weights


@flax.struct.dataclass
class Int8:
    """A weight in 8 bits, by the largest entry of each column: absmax quantisation (Dettmers et al. 2022,
    arXiv:2208.07339, section 2.1). A column is one output of a matrix, or one row of a table."""

    values: jax.Array
    scale: jax.Array
    """float32, of length 1 along the axes that a column has."""

    def as_array(self, weight: Weight) -> jax.Array:
        return self.values.astype(jnp.float32) * self.scale


def quantised(weight: Weight, w: jax.Array) -> Int8:
    """Each entry is rounded by at most half of its column's largest entry over 127."""
    first = len(weight.batch_axes)
    middle = first + len(weight.in_axes)
    column = range(first, middle) if weight.kind == "matmul" else range(middle, w.ndim)
    scale = jnp.max(jnp.abs(w), axis=tuple(column), keepdims=True) / 127
    return Int8(jnp.round(w / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)


# How a matrix or table is held, by the names that `tune.store` takes.
STORAGES: dict[str, Callable[[Weight, jax.Array], Any]] = {
    "float32": lambda weight, w: w,
    "bfloat16": lambda weight, w: w.astype(jnp.bfloat16),
    "int8": quantised,
}


def stored(spec: Spec, params: Params, name: str) -> Params:
    """Weights as they are held."""

    def one(weight: Weight, w: jax.Array) -> Any:
        small = weight.kind in ("matmul", "lookup") and not weight.float32
        return STORAGES[name](weight, w) if small else w

    held: Params = map_weights(one, spec, params)
    return held
