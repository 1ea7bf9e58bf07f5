"""How a weight multiplies activations. Those of experts do it by themselves (moe/moe.py, moe/grouped.py)."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.devices.mesh import current_mesh
from lmjax.models.product import product


def linear(
    x: jax.Array,
    w: Any,
    bias: jax.Array | None = None,
    *,
    contract: int = 1,
    rows_out: bool = False,
    dtype: Any = None,
) -> jax.Array:
    """x[*rows, *in] @ w[*in, *out] + bias[*out] -> [*rows, *out], contracting the `contract` axes named in.

    `rows_out`: the weight is w[out, in], as a table is that serves as a head; no transposed copy of it is made. `dtype`
    is the result's type (default: that of x); the sum itself is kept at least in float32 by XLA. On a mesh rows stay
    where they are and outputs are sharded as the weight's output axes are. The bias is float32.
    """
    assert not (rows_out and contract > 1)
    multiply_array = _flat if current_mesh() is None else _on_mesh

    def dot(x: jax.Array, w: jax.Array, *, contract: int = contract, dtype: Any = dtype or x.dtype) -> jax.Array:
        return multiply_array(x, w, contract, rows_out, dtype)

    y = multiply(x, w, dot, rows_out=rows_out)
    return y if bias is None else add_bias(y, bias)


def multiply(x: jax.Array, w: Any, dot: Callable[..., jax.Array], *, rows_out: bool = False) -> jax.Array:
    """`dot(x, w)` for an array; a compound (models/read.py) multiplies by its parts with it.

    `dot` takes the number of axes to contract and the result's type as `linear` does, where they differ from those of
    the whole product.
    """
    return w.multiply(x, dot, rows_out=rows_out) if hasattr(w, "multiply") else dot(x, w)


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y + a float32 bias for all rows alike, in y's type, added in float32: so the bias's gradient, a sum over all
    rows, is added up in float32. In bfloat16 a sum of equal terms stops growing at 256 of them."""
    return (y.astype(bias.dtype) + bias).astype(y.dtype)


def _flat(x: jax.Array, w: jax.Array, contract: int, rows_out: bool, dtype: Any) -> jax.Array:
    """Multiply as one matrix product of [B*T, in] by [in, out]: XLA's CPU backend computes a weight's gradient with its
    fast matmul only in two dimensions (1.36x on a whole step)."""
    rows = x.shape[: x.ndim - contract]
    ins, outs = (w.shape[1:], w.shape[:1]) if rows_out else (w.shape[:contract], w.shape[contract:])
    n_in, n_out = math.prod(ins), math.prod(outs)
    w = _short_side_first(w.reshape((n_out, n_in) if rows_out else (n_in, n_out)))
    y_RO = _dot(x.reshape(math.prod(rows), n_in), w, (1,), (1,) if rows_out else (0,), dtype)
    return y_RO.reshape(*rows, *outs)


def _short_side_first(w: jax.Array) -> jax.Array:
    """The matrix itself. Its gradient is a product over many rows, which XLA's CPU backend computes up to three times
    faster with the short side in front: [64, 256] rather than [256, 64]."""

    @jax.custom_vjp
    def same(w: jax.Array) -> jax.Array:
        return w

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        # The barrier keeps the product in that form: without it XLA would merge the transposition into it.
        if len(gradient) > gradient.shape[1]:
            return (jax.lax.optimization_barrier(gradient.T).T,)
        return (jax.lax.optimization_barrier(gradient),)

    same.defvjp(lambda w: (w, None), backward)
    return same(w)


def _on_mesh(x: jax.Array, w: jax.Array, contract: int, rows_out: bool, dtype: Any) -> jax.Array:
    """Multiply without merging axes and without a barrier.

    Merging [B, T] would move data where T is split. Behind a barrier XLA does not see that a weight's gradient is added
    up over devices only to be cut into their pieces, which is one reduce-scatter.
    """
    w_in = (1,) if rows_out else tuple(range(contract))
    return _dot(x, w, tuple(range(x.ndim - contract, x.ndim)), w_in, dtype)


def _dot(x: jax.Array, w: jax.Array, x_in: tuple[int, ...], w_in: tuple[int, ...], dtype: Any) -> jax.Array:
    """`dot_general`; contracting an axis that is split over devices adds their parts up."""
    out = None
    if current_mesh() is not None:
        axes = [axis for i, axis in enumerate(_mesh_axes(x)) if i not in x_in]
        axes += [axis for i, axis in enumerate(_mesh_axes(w)) if i not in w_in]
        out = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*axes))

    def dot(x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
        return jax.lax.dot_general(x, w, ((x_in, w_in), ((), ())), preferred_element_type=dtype, out_sharding=out)

    return product(dot, x, w) if dtype == jnp.float32 else dot(x, w, dtype)


def _mesh_axes(x: jax.Array) -> tuple[Any, ...]:
    """The mesh axes that each dimension is split over."""
    return tuple(jax.typeof(x).sharding.spec.partitions)
