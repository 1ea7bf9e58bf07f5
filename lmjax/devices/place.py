"""Arrays of the host onto the devices, and back."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lmjax.devices.mesh import replicated
from lmjax.devices.rows import batch_sharding, time_order
from lmjax.process import group
from lmjax.weights import Params


def use_mesh(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def local_rows(mesh: jax.sharding.Mesh | None, batch_size: int) -> np.ndarray:
    """The numbers of those rows of a batch that the devices of this process need."""
    rows = np.arange(batch_size)
    if mesh is None:
        return rows
    indices = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([rows[index] for index in indices]))


def shard_batch(mesh: jax.sharding.Mesh | None, batch_size: int) -> Callable[[Any], Any]:
    """Makes of host arrays, which hold this process's `local_rows` of a batch, global ones spread over the mesh.

    This is the one place where tokens are put in `rows.time_order`; sums over tokens do not see it.
    """
    if mesh is None:
        return functools.partial(jax.device_put, device=jax.devices()[0])
    rows = local_rows(mesh, batch_size)

    def put(x: np.ndarray) -> jax.Array:
        if x.ndim == 2:
            x = x[:, time_order(x.shape[1], mesh.shape["context"])]

        def shard(index: Any) -> np.ndarray:
            wanted, *rest = index
            low = np.searchsorted(rows, wanted.start or 0)
            return x[(slice(low, low + len(range(*wanted.indices(batch_size)))), *rest)]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), batch_sharding(mesh, x.ndim), shard)

    return functools.partial(jax.tree.map, put)


def replicate(mesh: jax.sharding.Mesh | None, tree: Any) -> Any:
    """The arrays of a tree whole, on every device."""
    return tree if mesh is None else group.in_turn(_gather_program(mesh)(tree))


@functools.cache
def _gather_program(mesh: jax.sharding.Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def on_one_device(mesh: jax.sharding.Mesh | None, params: Params) -> Params:
    """The weights whole on this process's first device; others hold one at a time. All processes call it together."""
    return jax.tree.map(lambda x: replicate(mesh, x).addressable_data(0), params)
