"""Rows in groups, each group times a matrix of its own: the products of a mixture of experts.

Letters beside the legend in model.py:  A rows  I inputs  O outputs  N blocks of M rows
"""

import jax
import jax.numpy as jnp

from lmjax.models.attention.attention import platform


def grouped_dot(x_AI: jax.Array, w_EIO: jax.Array, rows_E: jax.Array) -> jax.Array:
    """The first rows_E[0] rows times w_EIO[0], the next rows_E[1] times w_EIO[1], ... -> y_AO; rows_E sums to A.

    That is `jax.lax.ragged_dot`, which on CPUs multiplies every row by every group's matrix: there we multiply blocks.
    """
    if platform() == "cpu":
        return dot_by_blocks(x_AI, w_EIO, rows_E)
    return jax.lax.ragged_dot(x_AI, w_EIO, rows_E, preferred_element_type=x_AI.dtype)


def dot_by_blocks(x_AI: jax.Array, w_EIO: jax.Array, rows_E: jax.Array) -> jax.Array:
    """Each block holds rows of one group, the last of a group filled up with zeros, and has its own copy of the matrix.

    Blocks of a quarter of the mean group, or of 64 rows where that is more: then there are about 5 E of them at most,
    with at most A / 4 rows of zeros (or A, where the mean group has fewer than 256).
    """
    A, E = len(x_AI), len(w_EIO)
    M = max(1, min(64, A // E), A // (4 * E))
    N = (A + E * (M - 1)) // M  # as many as any division of A rows into E groups needs
    blocks_E = -(-rows_E // M)
    group_N = jnp.repeat(jnp.arange(E), blocks_E, total_repeat_length=N)
    padding_E = jnp.cumsum(blocks_E * M - rows_E)
    before_E = jnp.concatenate([jnp.zeros_like(padding_E[:1]), padding_E[:-1]])
    slot_A = jnp.arange(A) + jnp.repeat(before_E, rows_E, total_repeat_length=A)
    x_NMI = jnp.zeros_like(x_AI, shape=(N * M, x_AI.shape[1])).at[slot_A].set(x_AI).reshape(N, M, -1)
    y_NMO = jnp.einsum("NMI,NIO->NMO", x_NMI, w_EIO[group_N], preferred_element_type=x_AI.dtype)
    return y_NMO.reshape(N * M, -1)[slot_A]
