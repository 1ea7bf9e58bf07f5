"""The mesh that a model trains on, and the table that maps named axes to mesh axes.

Three files build a mesh for another end: generate/spread.py one of the same devices whose axes are Auto,
process/group.py one for votes, launch/price.py an abstract one of devices that are not there.

Everything runs under jax's Explicit axis types: a sharding is part of an array's type, and an operation that would
need a hidden transfer of data is an error at trace time. Without a mesh (`jax.set_mesh` not entered) the functions that
shard arrays do nothing, so the same model runs on one device, for example in a notebook or a test; text
generation, whose few tokens XLA lays out by itself, uses them so on a mesh too (lmjax/generate/spread.py).

    slices    copies of the model on groups of devices that only a data-centre network joins
    data      copies of the model, each of which sees other rows of the batch
    pipeline  stages, each of which holds its share of every stack of layers
    fsdp      as data, but weights and optimizer state are sharded; weights are all-gathered where they are used
    expert    as data, but the experts are sharded
    context   as fsdp, but the devices see other tokens of the same rows
    tensor    heads, mlp columns and vocabulary are sharded; between blocks, tokens are

docs/parallelism.md says what each costs and when to choose it.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmjax.devices.config import MeshConfig
from lmjax.errors import ConfigError
from lmjax.weights import Spec, Weight, map_weights

Names = tuple[str | None, ...]
AXES = ("slices", "data", "pipeline", "fsdp", "expert", "context", "tensor")  # the last ones have the fastest links


# Named axis -> the mesh axes that it is sharded along. A name that is absent is not sharded.
SHARDING_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("pipeline", "slices", "data", "fsdp", "expert"),  # in all layers outside the pipeline
    "microbatch": ("slices", "data", "fsdp", "expert"),  # rows inside a pipeline stage
    "time": ("context",),  # T inside attention and mlp
    "residual_time": ("context", "tensor"),  # T of the residual stream
    "layers": ("pipeline",),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "shared_mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
}


GATHERED = SHARDING_RULES["embed"]  # a weight is all-gathered along these where it is used
GATHER, CONSTRAIN = "gather", "constrain"  # names of results, by which `remat` decides what it keeps


# Layout -> its mesh axes. By default the first takes all devices that the others leave, and each other has size 2.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp": ("data",),
    "fsdp": ("fsdp",),
    "tp": ("tensor",),
    "cp": ("context",),
    "ep": ("expert",),
    "dp+fsdp": ("data", "fsdp"),
    "dp+tp": ("data", "tensor"),
    "fsdp+tp": ("fsdp", "tensor"),
    "fsdp+cp": ("fsdp", "context"),
    "fsdp+ep": ("fsdp", "expert"),
    "cp+tp": ("context", "tensor"),
    "dp+cp+tp": ("data", "context", "tensor"),
    "fsdp+cp+tp": ("fsdp", "context", "tensor"),
    "pp": ("pipeline",),
    "dp+pp": ("data", "pipeline"),
    "fsdp+pp": ("fsdp", "pipeline"),
    "dp+pp+tp": ("data", "pipeline", "tensor"),
}


def axis_sizes(cfg: MeshConfig, devices: int) -> dict[str, int]:
    """The size of every mesh axis on so many devices. Raises ConfigError when they do not fit."""
    rest, *others = LAYOUTS[cfg.layout]
    given = {axis: getattr(cfg, axis) for axis in AXES}
    sizes = {axis: given[axis] or (2 if axis in others else 1) for axis in AXES}
    product = math.prod(sizes.values())
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    if given[rest] is None:
        if devices % product:
            raise ConfigError(
                f"mesh: {shown} = {product} does not divide {devices} device(s), so mesh.{rest} cannot take the rest; "
                f"make it {_nearest_divisors(product, devices)}, or set mesh.{rest}"
            )
        return sizes | {rest: devices // product}
    if product > devices:
        raise ConfigError(f"mesh: {shown} = {product} does not fit {devices} device(s); lower one of them")
    return sizes


def _nearest_divisors(size: int, of: int) -> str:
    """The divisors of `of` next to `size`, as in "2 or 4"."""
    divisors = [n for n in range(1, of + 1) if of % n == 0]
    nearest = [max(n for n in divisors if n <= size), *[n for n in divisors if n > size][:1]]
    return " or ".join(map(str, nearest))


def own_devices() -> list[Any]:
    """The devices that this thread computes on: the one that `jax.default_device` names, else all."""
    one = jax.config.jax_default_device  # type: ignore[attr-defined]
    return [one] if isinstance(one, jax.Device) else jax.devices()


def make_mesh(cfg: MeshConfig, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of `cfg` over `devices` (default: this thread's), which may be those of a topology that is not here.

    The devices along the last axes are neighbours in the network; those along `slices` are in different slices.
    Raises ConfigError when the sizes do not fit.
    """
    devices = own_devices() if devices is None else list(devices)
    sizes = axis_sizes(cfg, len(devices))
    shape = tuple(sizes.values())
    devices = devices[: math.prod(shape)]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and sizes["slices"] == slices:
        across = (slices, *(1 for _ in shape[1:]))
        grid = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), across, devices, allow_split_physical_axes=True)
    elif slices > 1 and devices[0].platform == "tpu":
        raise ConfigError(
            f"mesh.slices={sizes['slices']} but the devices form {slices} slices; set mesh.slices={slices}"
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def current_mesh() -> Any | None:
    """The mesh that `jax.set_mesh` entered, or None, as where its axes are Auto: there XLA lays arrays out.

    Raises ConfigError for one that `make_mesh` has not made.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    if mesh.axis_names != AXES:
        raise ConfigError(
            f"the mesh has the axes {', '.join(mesh.axis_names)}; make it by lmjax.devices.mesh.make_mesh"
        )
    return None if {*mesh.axis_types} == {AxisType.Auto} else mesh


def platform() -> str:
    """What the program is for: the platform of the mesh, which may be of a machine that is not here, or our own."""
    mesh = current_mesh()
    device = None if mesh is None else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def compute_capability() -> tuple[int, int]:
    """That of our own NVIDIA GPU: (9, 0) is Hopper. (0, 0) where there is none; AMD's names are of another kind."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.local_devices()[0], "compute_capability", "")))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def mesh_axes(name: str | None, mesh: Any = None) -> tuple[str, ...]:
    """The mesh axes that a named axis is sharded along: those of its rule that are larger than 1.

    The mesh is the current one by default. Inside `per_stage` the axis of the stages is left out.
    """
    mesh = mesh or current_mesh()
    if mesh is None:
        return ()
    axes = tuple(axis for axis in SHARDING_RULES.get(name or "", ()) if mesh.shape[axis] > 1)
    if not {*axes} & {*mesh.manual_axes} & {*SHARDING_RULES["layers"]}:
        return axes
    assert (*mesh.manual_axes,) == SHARDING_RULES["layers"], f"call mesh_axes('{name}') before per_device, not inside"
    return tuple(axis for axis in axes if axis not in SHARDING_RULES["layers"])


def shards(name: str) -> int:
    """Into how many shards the current mesh cuts a named axis."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in mesh_axes(name))


def partition_spec(names: Names, mesh: Any = None) -> PartitionSpec:
    """Named axes -> PartitionSpec on a mesh (default: the current one).

    Raises ConfigError for names that put one mesh axis on two dimensions.
    """
    used = [axis for name in names for axis in SHARDING_RULES.get(name or "", ())]
    for axis in used:
        if used.count(axis) > 1:
            both = [repr(name) for name in names if axis in SHARDING_RULES.get(name or "", ())]
            raise ConfigError(f"the axes {' and '.join(both)} of {names} are both sharded along mesh.{axis}")
    return PartitionSpec(*(mesh_axes(name, mesh) or None for name in names))


def check_divides(
    name: str, size: int, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, *, setting: str | None = None
) -> None:
    """Raise ConfigError unless the mesh divides a named axis of this size (set by `setting`)."""
    axes = mesh_axes(name, mesh)
    pieces = math.prod(mesh.shape[axis] for axis in axes)
    if size % pieces:
        split = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
        multiples = [size // pieces * pieces] * (size >= pieces) + [-(-size // pieces) * pieces]
        what = setting or f"the axis '{name}'"
        raise ConfigError(
            f"{split} does not divide {what} of size {size}; use {_nearest_divisors(pieces, size)} devices, or a size "
            f"of {' or '.join(map(str, multiples))}"
        )


def shardings(spec: Spec, mesh: jax.sharding.Mesh) -> Any:
    """A tree of NamedSharding, one per weight. Raises ConfigError for a weight that its mesh axes do not divide."""

    def sharding(weight: Weight) -> NamedSharding:
        for name, size in zip(weight.names, weight.shape, strict=True):
            check_divides(name, size, mesh)
        return NamedSharding(mesh, partition_spec(weight.names, mesh))

    return map_weights(sharding, spec)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Reshard `x` as the names of its axes say."""
    return x if current_mesh() is None else checkpoint_name(jax.sharding.reshard(x, partition_spec(names)), CONSTRAIN)


def constrain_leading(x: jax.Array, names: Names) -> jax.Array:
    """Reshard the first axes of `x` as their names say; the others keep their sharding."""
    if current_mesh() is None:
        return x
    return jax.sharding.reshard(x, PartitionSpec(*partition_spec(names), *jax.typeof(x).sharding.spec[len(names) :]))


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes in an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def all_axes(entries: Iterable[Any]) -> list[str]:
    return [axis for entry in entries for axis in axes_of(entry)]


def reshape(x: jax.Array, shape: tuple[int, ...], axes: tuple[Any, ...]) -> jax.Array:
    """Reshape; `axes` are the mesh axes that each new dimension is sharded along."""
    if current_mesh() is None:
        return jnp.reshape(x, shape)
    sharding = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*(entry or None for entry in axes)))
    return jax.lax.reshape(x, shape, out_sharding=sharding)


def specs_of(tree: Any) -> Any:
    """The PartitionSpecs of a tree of arrays on the current mesh; None without a mesh."""
    return None if current_mesh() is None else jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)
