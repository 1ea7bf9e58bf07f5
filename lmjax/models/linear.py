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
    """As one matrix product of [B*T, in] by [in, out], in the forms that XLA's CPU backend is fast at.

    It computes a weight's gradient with its fast matmul only in two dimensions (1.36x on a whole step), and then 2.7
    times faster with the short side in front: [128, 512] rather than [512, 128]. The barrier keeps the weight in that
    orientation; without it XLA folds the transposition away, and the gradient comes out the slow way.
    """
    rows, outs = x.shape[: x.ndim - contract], w.shape[contract:]
    size_in, size_out = math.prod(w.shape[:contract]), math.prod(outs)
    x_RI, w_IO = x.reshape(math.prod(rows), size_in), w.reshape(size_in, size_out)
    if size_in > size_out:
        w_OI = jax.lax.optimization_barrier(w_IO.T)
        y = jax.lax.dot_general(x_RI, w_OI, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    else:
        w_IO = jax.lax.optimization_barrier(w_IO)
        y = jnp.matmul(x_RI, w_IO, preferred_element_type=dtype)
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
