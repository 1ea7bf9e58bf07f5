"""The rows of a batch on the devices: a batch says which axes its arrays have, and its shardings follow.

    @flax.struct.dataclass
    class Pairs:
        chosen_BT: Any = axes("batch time")
        margin_B: Any = axes("batch")
        patches_BPD: Any = axes("batch patch embed")

`batch` comes first and is spread over the devices that see different rows, `time` over those that share a row, whose
tokens are then in `time_order`. All other axes are replicated.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lmjax.devices.mesh import check_divides, partition_spec, reshape, shards
from lmjax.errors import ConfigError

AnyBatch = TypeVar("AnyBatch")
"""A batch: a dataclass whose fields are arrays, or None where there is nothing."""


def axes(names: str, **default: Any) -> Any:
    """A field of a batch with its axes by name, `batch` first; `default=None` for one that may be absent."""
    assert names.split()[0] == "batch", names
    return flax.struct.field(metadata={"axes": names}, **default)


def map_arrays(function: Callable[[str, Any], Any], batch: AnyBatch) -> AnyBatch:
    """The batch with `function(axes, array)` in the place of every array that is there."""
    fields = {field.name: field.metadata["axes"] for field in dataclasses.fields(batch)}  # type: ignore[arg-type]
    present = {name: names for name, names in fields.items() if getattr(batch, name) is not None}
    changed = {name: function(names, getattr(batch, name)) for name, names in present.items()}
    return dataclasses.replace(batch, **changed)  # type: ignore[type-var]


def time_order(T: int, devices: int) -> np.ndarray:
    """Which token of a row is at each place of the time axis, [T], when this many devices share the row.

    Device i of n holds chunks i and 2n - 1 - i of the row's 2n chunks: under a causal mask early tokens have little to
    attend to and late ones much, and so every device has the same (zig-zag order: Zhu, github.com/zhuzilin/
    ring-flash-attention).
    """
    chunks = np.arange(T).reshape(2 * devices, -1)
    return np.concatenate([chunks[[i, 2 * devices - 1 - i]] for i in range(devices)], axis=None)


def token_order(T: int) -> jax.Array:
    """`time_order` on the current mesh: 0, 1, ... unless devices share rows."""
    devices = shards("time")
    return jnp.arange(T) if devices == 1 else jnp.asarray(time_order(T, devices), jnp.int32)


def row_sharding(mesh: jax.sharding.Mesh, names: str) -> NamedSharding:
    """The sharding of an array of a batch with these axes."""
    split = (name if name in ("batch", "time") else None for name in names.split())
    return NamedSharding(mesh, partition_spec(tuple(split), mesh))


def check_batch(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, *, rows: int, setting: str, T: int) -> None:
    """Raise ConfigError unless the mesh divides batches of `rows` rows, a number set by `setting`, of T tokens."""
    check_divides("batch", rows, mesh, setting=setting)
    check_divides("residual_time", T, mesh, setting="data.seq_len")
    if mesh.shape["context"] > 1 and T % (2 * mesh.shape["context"]):
        raise ConfigError(
            f"mesh.context={mesh.shape['context']} cuts rows into {2 * mesh.shape['context']} chunks, which do not "
            f"divide data.seq_len={T}; use a multiple of {2 * mesh.shape['context']}"
        )


def split_rows(x: jax.Array, pieces: int) -> jax.Array:
    """[B, ...] -> [pieces, B / pieces, ...]: every piece takes rows from all over, so from every device."""
    rows, *rest = jax.typeof(x).sharding.spec
    return reshape(x, (len(x) // pieces, pieces, *x.shape[1:]), (rows, None, *rest)).swapaxes(0, 1)


def join_rows(x: jax.Array) -> jax.Array:
    """The inverse of `split_rows`."""
    _, *rest = jax.typeof(x).sharding.spec
    return reshape(x.swapaxes(0, 1), (x.shape[0] * x.shape[1], *x.shape[2:]), tuple(rest))
