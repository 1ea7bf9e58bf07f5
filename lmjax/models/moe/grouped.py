"""Multiply groups of rows, each by a matrix of its own: the matrix products of a mixture of experts."""

import jax
import jax.numpy as jnp

from lmjax.devices.mesh import platform


def grouped_dot(x_AI: jax.Array, w_EIO: jax.Array, rows_E: jax.Array) -> jax.Array:
    """The first rows_E[0] rows times w_EIO[0], the next rows_E[1] times w_EIO[1], ... -> y_AO; rows_E sums to A.

    That is `jax.lax.ragged_dot`. On CPUs it multiplies every row by every group's matrix, so `dot_by_blocks` replaces
    it there.
    """
    if platform() == "cpu":
        return dot_by_blocks(x_AI, w_EIO, rows_E)
    return jax.lax.ragged_dot(x_AI, w_EIO, rows_E, preferred_element_type=x_AI.dtype)


def dot_by_blocks(x_AI: jax.Array, w_EIO: jax.Array, rows_E: jax.Array) -> jax.Array:
    """Cut the rows into J blocks of M rows, each with rows of one group and its own copy of the group's matrix.

    The last block of a group is padded with zeros.

    A block has a quarter of the mean group's rows, or 64 rows if that is more. Then there are at most about 5 E blocks,
    with at most A / 4 rows of zeros (or A, when the mean group has fewer than 256 rows).
    """
    A, E = len(x_AI), len(w_EIO)
    M = max(1, min(64, A // E), A // (4 * E))
    J = (A + E * (M - 1)) // M  # as many as any division of A rows into E groups needs
    blocks_E = -(-rows_E // M)
    group_J = jnp.repeat(jnp.arange(E), blocks_E, total_repeat_length=J)
    padding_E = jnp.cumsum(blocks_E * M - rows_E)
    before_E = jnp.concatenate([jnp.zeros_like(padding_E[:1]), padding_E[:-1]])
    slot_A = jnp.arange(A) + jnp.repeat(before_E, rows_E, total_repeat_length=A)
    x_JMI = jnp.zeros_like(x_AI, shape=(J * M, x_AI.shape[1])).at[slot_A].set(x_AI).reshape(J, M, -1)
    y_JMO = jnp.einsum("JMI,JIO->JMO", x_JMI, w_EIO[group_J], preferred_element_type=x_AI.dtype)
    return y_JMO.reshape(J * M, -1)[slot_A]
