"""The one place where a weight multiplies activations."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.layout import current_mesh


def linear(
    x: jax.Array, w: jax.Array, bias: jax.Array | None = None, *, contract: int = 1, dtype: Any = None
) -> jax.Array:
    """x[*rows, *in] @ w[*in, *out] + bias[*out] -> [*rows, *out], contracting the `contract` axes named in.

    `dtype` is the result's type (default: that of x); the sum itself is kept at least in float32 by XLA.
    """
    dtype = dtype or x.dtype
    if current_mesh() is None:
        y = _flat(x, w, contract, dtype)
    else:
        y = _sharded(x, w, contract, dtype)
    return y if bias is None else y + bias.astype(dtype)


def _flat(x: jax.Array, w: jax.Array, contract: int, dtype: Any) -> jax.Array:
    """As one matrix product of [B*T, in] by [in, out].

    XLA's CPU backend computes a weight's gradient with its fast matmul only in two dimensions: 1.36x on a whole step.
    """
    rows, outs = x.shape[: x.ndim - contract], w.shape[contract:]
    size_in = math.prod(w.shape[:contract])
    y = jnp.matmul(
        x.reshape(math.prod(rows), size_in), w.reshape(size_in, math.prod(outs)), preferred_element_type=dtype
    )
    return y.reshape(*rows, *outs)


def _sharded(x: jax.Array, w: jax.Array, contract: int, dtype: Any) -> jax.Array:
    """Rows stay where they are, outputs lie as the weight's; merging [B, T] could move data between devices."""
    x_sharding, w_sharding = jax.typeof(x).sharding, jax.typeof(w).sharding
    out = PartitionSpec(*x_sharding.spec[: x.ndim - contract], *w_sharding.spec[contract:])
    contracted = (tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract)))
    return jax.lax.dot_general(
        x,
        w,
        (contracted, ((), ())),
        preferred_element_type=dtype,
        out_sharding=NamedSharding(x_sharding.mesh, out),
    )
