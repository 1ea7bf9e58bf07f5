"""How a weight multiplies activations. Those of experts do it by themselves (moe/moe.py, moe/grouped.py)."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.devices.mesh import current_mesh, platform
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
        if hasattr(w, "product"):  # a matrix in fewer bits: generate/small.py
            return w.product(x, contract, dtype)
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
    x_RI, w = x.reshape(math.prod(rows), n_in), w.reshape((n_out, n_in) if rows_out else (n_in, n_out))
    multiply_matrices = _on_cpu if platform() == "cpu" else _matrices
    return multiply_matrices(x_RI, w, rows_out, dtype).reshape(*rows, *outs)


def _matrices(x_RI: jax.Array, w: jax.Array, rows_out: bool, dtype: Any) -> jax.Array:
    return _dot(x_RI, w, (1,), (1,) if rows_out else (0,), dtype)


def _on_cpu(x_RI: jax.Array, w: jax.Array, rows_out: bool, dtype: Any) -> jax.Array:
    """The same product with a gradient of the weight in the form that is fast on CPUs."""

    @jax.custom_vjp
    def multiplied(x_RI: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x_RI, w, (((1,), (1 if rows_out else 0,)), ((), ())), preferred_element_type=dtype)

    def backward(factors: tuple[jax.Array, jax.Array], dy_RO: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_RI, w = factors
        dy_RO = dy_RO.astype(x_RI.dtype)  # see product.py
        dx_RI = dy_RO @ w if rows_out else dy_RO @ w.T
        return dx_RI, _over_rows(dy_RO, x_RI) if rows_out else _over_rows(x_RI, dy_RO)

    multiplied.defvjp(lambda x_RI, w: (multiplied(x_RI, w), (x_RI, w)), backward)
    return multiplied(x_RI, w)


def _over_rows(a_RA: jax.Array, b_RB: jax.Array) -> jax.Array:
    """a^T b, [A, B], as XLA's CPU backend computes it fastest: with the short side in front, up to three times faster.

    From a transposed copy that lies in memory as it is read, 16 bits are up to five times faster (jax 0.12 on a CPU
    with matrix units), and float32 1.05 to 1.2 times where rows are a small power of two long, so that a column
    falls on few lines of the cache; beside a side that is much longer the copy saves nothing.
    """
    A, B = a_RA.shape[1], b_RB.shape[1]
    if A > B:
        return _over_rows(b_RB, a_RA).T
    a_AR = a_RA.T
    if a_RA.dtype.itemsize == 2 or (A.bit_count() == 1 and A <= 512 and B <= 2 * A):
        a_AR = with_layout_constraint(a_AR, Layout((0, 1)))
    # The barrier keeps the product in that form: without it XLA would merge a transposition into it.
    return jax.lax.optimization_barrier(a_AR @ b_RB)


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
