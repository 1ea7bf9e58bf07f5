"""Send rows to the devices that hold their experts, and back: an all-to-all over mesh.expert.

P devices have A rows each. A device may receive all rows of all devices, so its buffer has R = P A rows. A ragged
all-to-all moves only the rows themselves. XLA has none on CPU: there every device sends a block of A rows to each
device, and most of a block may be empty.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.devices.mesh import mesh_axes, shards


class Routes(NamedTuple):
    """How the A rows of this device, sorted by destination, go to the P devices of mesh.expert."""

    sent_P: jax.Array
    """How many rows go to each device."""
    received_P: jax.Array
    """How many rows come from each device."""
    place_A: jax.Array
    """The index of each row when every device has a block of A rows."""


def routes(destination_A: jax.Array) -> Routes:
    """`destination_A`, sorted, is the device that each row goes to."""
    A = len(destination_A)
    sent_P = jnp.bincount(destination_A, length=shards("experts"))
    received_P = jax.lax.all_to_all(sent_P, mesh_axes("experts"), 0, 0, tiled=True)
    place_A = destination_A * A + jnp.arange(A) - _starts(sent_P)[destination_A]
    return Routes(sent_P, received_P, place_A)


def _starts(sizes_P: jax.Array) -> jax.Array:
    return jnp.cumsum(sizes_P) - sizes_P


def send(by: Routes, x_AI: jax.Array, fill: float = 0, *, ragged: bool) -> jax.Array:
    """The rows of this device -> the rows that it receives.

    In y_RI every sender has a block of A rows. Its rows come first in the block, and the rest has the value `fill`.
    """
    axis, P, A = mesh_axes("experts"), shards("experts"), len(x_AI)
    buffer_RI = jnp.full((P * A, *x_AI.shape[1:]), fill, x_AI.dtype)
    if not ragged:
        return jax.lax.all_to_all(buffer_RI.at[by.place_A].set(x_AI), axis, 0, 0, tiled=True)
    there_P = jnp.full(P, A * jax.lax.axis_index(axis))
    return jax.lax.ragged_all_to_all(
        x_AI, buffer_RI, _starts(by.sent_P), by.sent_P, there_P, by.received_P, axis_name=axis
    )


def send_back(by: Routes, y_RI: jax.Array, *, ragged: bool) -> jax.Array:
    """The results for the rows that came, in the same order -> the results for the A rows of this device."""
    axis, P, A = mesh_axes("experts"), shards("experts"), len(by.place_A)
    if not ragged:
        return jax.lax.all_to_all(y_RI, axis, 0, 0, tiled=True)[by.place_A]
    there_P = jax.lax.all_to_all(_starts(by.sent_P), axis, 0, 0, tiled=True)
    buffer_AI = jnp.zeros((A, *y_RI.shape[1:]), y_RI.dtype)
    return jax.lax.ragged_all_to_all(
        y_RI, buffer_AI, A * jnp.arange(P), by.received_P, there_P, by.sent_P, axis_name=axis
    )
