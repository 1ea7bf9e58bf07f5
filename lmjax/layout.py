"""The mesh, and the one table that says which named axis lies on which mesh axis. The only file that builds a mesh.

Everything runs under jax's Explicit axis types: a sharding is part of an array's type, and an operation that would move
data unasked is an error at trace time that names the operation. Without a mesh (`jax.set_mesh` not entered) every
function here does nothing, so a model runs on one device, in a notebook or a test, without knowing about layouts.

    data    copies of the model, each sees other rows of the batch
    fsdp    as data, but weights and optimizer state are sharded and gathered where they are used
    tensor  attention heads and mlp columns are split
"""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.errors import ConfigError
from lmjax.schema import PositiveInt, config_class
from lmjax.weights import Spec, Weight, map_weights

# Named axis -> mesh axes. A name that is absent is not sharded.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


@config_class
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices used."""

    data: PositiveInt | None = None
    """Data-parallel copies; None takes every device that fsdp and tensor leave over."""
    fsdp: PositiveInt = 1
    """Devices that share one copy of the weights."""
    tensor: PositiveInt = 1
    """Devices that share one layer's heads and mlp columns."""


def make_mesh(cfg: MeshConfig, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of `cfg` over `devices` (default: all). Raises ConfigError when the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    inner = cfg.fsdp * cfg.tensor
    data = cfg.data or len(devices) // inner
    if data * inner == 0 or data * inner > len(devices):
        raise ConfigError(
            f"mesh: data {cfg.data or 'auto'} x fsdp {cfg.fsdp} x tensor {cfg.tensor} does not fit {len(devices)} "
            "device(s); lower one of mesh.data, mesh.fsdp, mesh.tensor"
        )
    axis_types = (jax.sharding.AxisType.Explicit,) * 3
    shape = (data, cfg.fsdp, cfg.tensor)
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types, devices=devices[: math.prod(shape)])


def partition(names: tuple[str | None, ...], *, without: str | None = None) -> PartitionSpec:
    """Named axes -> PartitionSpec, leaving out the mesh axis `without`."""

    def mesh_axes(name: str | None) -> str | tuple[str, ...] | None:
        rule = RULES.get(name) if name else None
        return None if rule == without else rule

    entries = [mesh_axes(name) for name in names]
    used = [axis for entry in entries if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    assert len(set(used)) == len(used), f"axes {names} put a mesh axis on two dimensions: {entries}"
    return PartitionSpec(*entries)


def current_mesh() -> Any | None:
    """The mesh that `jax.set_mesh` entered, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Lay `x` out by its named axes."""
    return x if current_mesh() is None else jax.sharding.reshard(x, partition(names))


def gather(params: Any, spec: Spec) -> Any:
    """Weights as a layer uses them: whole along fsdp, still split along tensor.

    Its transpose is a reduce-scatter, so gradients come back sharded like the weights.
    """
    if current_mesh() is None:
        return params

    def gather_one(weight: Weight, x: jax.Array) -> jax.Array:
        return jax.sharding.reshard(x, partition(weight.names, without="fsdp"))

    return map_weights(gather_one, spec, params)


def shardings(spec: Spec, mesh: jax.sharding.Mesh) -> Any:
    """A tree of NamedSharding, one per weight. Raises ConfigError for a weight that its mesh axes do not divide."""

    def sharding(weight: Weight) -> NamedSharding:
        pspec = partition(weight.names)
        for name, size, axis in zip(weight.names, weight.shape, pspec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise ConfigError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide the axis '{name}' of size {size}; "
                    f"use a divisor of {size}"
                )
        return NamedSharding(mesh, pspec)

    return map_weights(sharding, spec)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows of a batch over data and fsdp."""
    return NamedSharding(mesh, partition(("batch",)))
