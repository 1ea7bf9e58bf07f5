"""Arrays of the host onto the devices, and back."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lmjax.devices.mesh import own_devices, replicated
from lmjax.devices.rows import AnyBatch, map_arrays, row_sharding, time_order
from lmjax.process import group


def use_mesh(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """`jax.set_mesh` where there is a mesh; on a single device nothing happens."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


@functools.cache
def local_rows(mesh: jax.sharding.Mesh | None, size: int) -> np.ndarray:
    """The numbers of those rows of a batch of `size` that the devices of this process need."""
    rows = np.arange(size)
    if mesh is None:
        return rows
    indices = row_sharding(mesh, "batch").addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([rows[index] for index in indices]))


def shard_batch(batch: AnyBatch, mesh: jax.sharding.Mesh | None, size: int) -> AnyBatch:
    """A batch of `size` rows on the devices, of host arrays that hold this process's `local_rows` of it."""
    return map_arrays(lambda names, x: shard_array(x, names, mesh, size), batch)


def shard_array(x: np.ndarray, names: str, mesh: jax.sharding.Mesh | None, size: int) -> jax.Array:
    """One array of a batch, whose axes have these names, on the devices.

    Tokens from the host are put in `rows.time_order` here, and only here. Sums over tokens do not see the order; what
    does, such as positions, asks `rows.token_order`.
    """
    if mesh is None:
        return jax.device_put(x, own_devices()[0])
    rows = local_rows(mesh, size)
    if "time" in names.split():
        axis = names.split().index("time")
        x = np.take(x, time_order(x.shape[axis], mesh.shape["context"]), axis)

    def shard(index: Any) -> np.ndarray:
        wanted, *rest = index
        low = np.searchsorted(rows, wanted.start or 0)
        return x[(slice(low, low + len(range(*wanted.indices(size)))), *rest)]

    return jax.make_array_from_callback((size, *x.shape[1:]), row_sharding(mesh, names), shard)


def replicate(mesh: jax.sharding.Mesh | None, tree: Any) -> Any:
    """Every array of a tree, whole on every device."""
    return tree if mesh is None else group.wait_on_cpu(_gather_program(mesh)(tree))


def on_host(mesh: jax.sharding.Mesh | None, batch: AnyBatch) -> AnyBatch:
    """A whole batch as numpy, its tokens in their own order. All processes call it together."""

    def fetch(names: str, x: jax.Array) -> np.ndarray:
        rows = whole(mesh, x)
        if mesh is None or "time" not in names.split():
            return rows
        axis = names.split().index("time")
        return np.take(rows, np.argsort(time_order(rows.shape[axis], mesh.shape["context"])), axis)

    return map_arrays(fetch, batch)


def whole(mesh: jax.sharding.Mesh | None, x: jax.Array) -> np.ndarray:
    """An array of the devices on the host. All processes call it together."""
    return np.asarray(replicate(mesh, x).addressable_data(0))


@functools.cache
def _gather_program(mesh: jax.sharding.Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def gather_to_one_device(mesh: jax.sharding.Mesh | None, params: Any) -> Any:
    """The weights whole on this process's first device; others hold one at a time. All processes call it together."""
    return jax.tree.map(lambda x: replicate(mesh, x).addressable_data(0), params)
