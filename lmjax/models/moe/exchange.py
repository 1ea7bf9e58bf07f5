"""Rows to the devices that hold their experts, and back: all-to-all over mesh.expert.

Every device receives into room for all rows of all, [n A, ...], n devices of A rows each, since any of them may come.
Only the rows themselves travel; on CPU, where XLA cannot do that, every device sends each other a piece of A rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.devices.mesh import mesh_axes, shards


class Routes(NamedTuple):
    """How the A rows of this device go to the n devices of mesh.expert; rows are sorted by destination."""

    sent_N: jax.Array
    """How many go to each."""
    received_N: jax.Array
    """How many come from each."""
    place_A: jax.Array
    """Where each row lies among n pieces of A."""


def routes(destination_A: jax.Array) -> Routes:
    """`destination_A` is sorted."""
    A = len(destination_A)
    sent_N = jnp.bincount(destination_A, length=shards("experts"))
    received_N = jax.lax.all_to_all(sent_N, mesh_axes("experts"), 0, 0, tiled=True)
    place_A = destination_A * A + jnp.arange(A) - _starts(sent_N)[destination_A]
    return Routes(sent_N, received_N, place_A)


def _starts(sizes_N: jax.Array) -> jax.Array:
    return jnp.cumsum(sizes_N) - sizes_N


def send(by: Routes, x_AI: jax.Array, fill: float = 0, *, ragged: bool) -> jax.Array:
    """Rows [A, ...] -> what comes, [n A, ...]: a piece per device, its rows in front, the rest of it `fill`."""
    axis, n, A = mesh_axes("experts"), shards("experts"), len(x_AI)
    room_RI = jnp.full((n * A, *x_AI.shape[1:]), fill, x_AI.dtype)
    if not ragged:
        return jax.lax.all_to_all(room_RI.at[by.place_A].set(x_AI), axis, 0, 0, tiled=True)
    there_N = jnp.full(n, A * jax.lax.axis_index(axis))
    return jax.lax.ragged_all_to_all(
        x_AI, room_RI, _starts(by.sent_N), by.sent_N, there_N, by.received_N, axis_name=axis
    )


def send_back(by: Routes, y_RI: jax.Array, *, ragged: bool) -> jax.Array:
    """What came, each row changed where it lies -> the A rows of this device."""
    axis, n, A = mesh_axes("experts"), shards("experts"), len(by.place_A)
    if not ragged:
        return jax.lax.all_to_all(y_RI, axis, 0, 0, tiled=True)[by.place_A]
    there_N = jax.lax.all_to_all(_starts(by.sent_N), axis, 0, 0, tiled=True)
    room_AI = jnp.zeros((A, *y_RI.shape[1:]), y_RI.dtype)
    return jax.lax.ragged_all_to_all(
        y_RI, room_AI, A * jnp.arange(n), by.received_N, there_N, by.sent_N, axis_name=axis
    )
