"""The mesh, and the one table that says which named axis lies on which mesh axis. The only file that builds a mesh.

Everything runs under jax's Explicit axis types: a sharding is part of an array's type, and an operation that would move
data unasked is an error at trace time that names the operation. Without a mesh (`jax.set_mesh` not entered) every
function here does nothing, so a model runs on one device, in a notebook or a test, without knowing about layouts.

    slices    copies of the model on groups of devices that only a data-centre network joins
    data      copies of the model, each sees other rows of the batch
    pipeline  stages, each of which holds its share of every stack of layers
    fsdp      as data, but weights and optimizer state are split, and gathered where they are used
    expert    as data, but each device holds its share of the experts
    context   as fsdp, but the devices see other tokens of the same rows
    tensor    heads, mlp columns and vocabulary are split; between blocks, tokens

docs/parallelism.md says what each costs and when to choose it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmjax.errors import ConfigError
from lmjax.mesh_config import MeshConfig as MeshConfig
from lmjax.weights import Spec, Weight, map_weights

Names = tuple[str | None, ...]

AXES = ("slices", "data", "pipeline", "fsdp", "expert", "context", "tensor")  # the last ones have the fastest links

# Named axis -> mesh axes. A name that is absent is not split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("pipeline", "slices", "data", "fsdp", "expert"),  # stages share rows, but for the layers they run
    "microbatch": ("slices", "data", "fsdp", "expert"),  # B inside a stage
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
GATHERED = RULES["embed"]  # what a weight is gathered over where it is used
GATHER, CONSTRAIN = "gather", "constrain"  # by these names `remat` knows whose results it is to keep

# Name -> the axes that it splits over. The first takes the devices that the others leave, each of which has 2.
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


# The mesh ---------------------------------------------------------------------------------------------------------


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


def make_mesh(cfg: MeshConfig, devices: list[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of `cfg` over `devices` (default: all), which may be those of a topology that is not here.

    Axes are laid onto the network so that the last ones have neighbours; `slices` lies across slices.
    Raises ConfigError when the sizes do not fit.
    """
    devices = jax.devices() if devices is None else list(devices)
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
    """The mesh that `jax.set_mesh` entered, or None. Raises ConfigError for one that `make_mesh` has not made."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    if mesh.axis_names != AXES:
        raise ConfigError(f"the mesh has the axes {', '.join(mesh.axis_names)}; make it by lmjax.layout.make_mesh")
    return mesh


# Named axes -> shardings ------------------------------------------------------------------------------------------


def mesh_axes(name: str | None, mesh: Any = None) -> tuple[str, ...]:
    """What splits a named axis on a mesh (default: the current one): the axes of its rule that are larger than 1.

    Inside `per_stage` a stage stands alone: the stages' axis is left out.
    """
    mesh = mesh or current_mesh()
    if mesh is None:
        return ()
    axes = tuple(axis for axis in RULES.get(name or "", ()) if mesh.shape[axis] > 1)
    if not {*axes} & {*mesh.manual_axes} & {*RULES["layers"]}:
        return axes
    assert (*mesh.manual_axes,) == RULES["layers"], f"what splits '{name}' is to be asked before per_device"
    return tuple(axis for axis in axes if axis not in RULES["layers"])


def shards(name: str) -> int:
    """Into how many pieces the current mesh splits a named axis."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in mesh_axes(name))


def partition(names: Names, mesh: Any = None) -> PartitionSpec:
    """Named axes -> PartitionSpec on a mesh (default: the current one).

    Raises ConfigError for names that put one mesh axis on two dimensions.
    """
    used = [axis for name in names for axis in RULES.get(name or "", ())]
    for axis in used:
        if used.count(axis) > 1:
            both = [repr(name) for name in names if axis in RULES.get(name or "", ())]
            raise ConfigError(f"the axes {' and '.join(both)} of {names} both lie on mesh.{axis}")
    return PartitionSpec(*(mesh_axes(name, mesh) or None for name in names))


def check_divides(name: str, size: int, mesh: jax.sharding.Mesh, *, setting: str | None = None) -> None:
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
        return NamedSharding(mesh, partition(weight.names, mesh))

    return map_weights(sharding, spec)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Lay `x` out by its named axes."""
    return x if current_mesh() is None else checkpoint_name(jax.sharding.reshard(x, partition(names)), CONSTRAIN)


def split_in_front(x: jax.Array, names: Names) -> jax.Array:
    """Lay the first axes of `x` out by name; the others stay."""
    if current_mesh() is None:
        return x
    return jax.sharding.reshard(x, PartitionSpec(*partition(names), *jax.typeof(x).sharding.spec[len(names) :]))


def whole_copies(x: jax.Array, batch_axes: Names) -> jax.Array:
    """Lay each copy in a stack whole on one device: the stack's first axis is spread over as many of the mesh axes that
    a copy was split over as divide it; along the others every device holds all of them."""
    mesh = current_mesh()
    if mesh is None:
        return x
    spec, front = jax.typeof(x).sharding.spec, [mesh_axes(name) for name in batch_axes]
    spread = _all_axes(spec[len(front) :]) if front else []
    while spread and len(x) % math.prod(mesh.shape[axis] for axis in (*front[0], *spread)):
        spread.pop()
    entries = [(*axes, *(spread if i == 0 else ())) or None for i, axes in enumerate(front)]
    return jax.sharding.reshard(x, PartitionSpec(*entries, *(None for _ in range(x.ndim - len(front)))))


def gather(params: Any, spec: Spec | None = None) -> Any:
    """Weights as a layer uses them: whole along fsdp and context, still split along tensor and expert.

    Gradients come back split like the weights. That of a matrix of `spec` stays a sum that is not yet added up (jax's
    type `unreduced`) until a reduce-scatter has cut it into pieces: only those are then added up over the mesh axes
    along which devices hold other tokens and the same piece. Inside a pipeline's stage, where jax 0.10.2 has no such
    types, XLA is left to find that out. Experts are left to `whole`.
    """
    mesh = current_mesh()
    if mesh is None:
        return params

    def gather_one(w: jax.Array) -> jax.Array:
        return checkpoint_name(jax.sharding.reshard(w, _without(jax.typeof(w).sharding.spec, GATHERED)), GATHER)

    def by_kind(weight: Weight, w: jax.Array) -> jax.Array:
        if "experts" in weight.names:
            return w
        if weight.kind != "matmul" or mesh.manual_axes:
            return gather_one(w)
        return checkpoint_name(_gather_unreduced(w), GATHER)

    if spec is None:
        return jax.tree.map(gather_one, params)
    return map_weights(by_kind, spec, params)


def _gather_unreduced(w: jax.Array) -> jax.Array:
    """One matrix, typed `reduced` over every mesh axis that tokens are split over: its gradient is then `unreduced`."""
    spec = jax.typeof(w).sharding.spec
    summed = {*mesh_axes("batch"), *mesh_axes("time")}
    lies = PartitionSpec(*spec, reduced=summed - {*_all_axes(spec)})
    w = jax.sharding.reshard(w, lies)
    if not _gathered_dimensions(spec):
        return w
    ((i, axes),) = _gathered_dimensions(spec)

    def run(w: jax.Array) -> jax.Array:
        rows = jnp.moveaxis(w, i, 0)  # TPUs cannot scatter every number of columns
        matrix = jax.lax.all_gather(rows.reshape(len(rows), -1), axes, tiled=True, to="reduced")
        return jnp.moveaxis(matrix.reshape(-1, *rows.shape[1:]), 0, i)

    to = PartitionSpec(*_without(spec, GATHERED), reduced=summed)
    return jax.shard_map(run, in_specs=lies, out_specs=to)(w)


def _without(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(tuple(axis for axis in _axes(entry) if axis not in axes) or None for entry in spec))


# Batches ----------------------------------------------------------------------------------------------------------


def time_order(T: int, context: int) -> np.ndarray:
    """Which token of a row lies at each place of the time axis, [T], when `context` devices share the row.

    Device i of n holds chunks i and 2n - 1 - i of the row's 2n chunks: under a causal mask early tokens have little to
    attend to and late ones much, and so every device has the same (zig-zag order: Zhu, github.com/zhuzilin/
    ring-flash-attention).
    """
    chunks = np.arange(T).reshape(2 * context, -1)
    return np.concatenate([chunks[[i, 2 * context - 1 - i]] for i in range(context)], axis=None)


def token_order(T: int) -> jax.Array:
    """`time_order` on the current mesh: 0, 1, ... unless devices share rows."""
    context = shards("time")
    return jnp.arange(T) if context == 1 else jnp.asarray(time_order(T, context), jnp.int32)


def batch_sharding(mesh: jax.sharding.Mesh, ndim: int = 2) -> NamedSharding:
    """Of an array [B, T] or [B] of a batch."""
    return NamedSharding(mesh, partition(("batch", "time")[:ndim], mesh))


def check_batch(mesh: jax.sharding.Mesh, *, rows: int, setting: str, T: int) -> None:
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
    _, *lying = jax.typeof(x).sharding.spec
    return reshape(x.swapaxes(0, 1), (x.shape[0] * x.shape[1], *x.shape[2:]), lying)


# Device by device -------------------------------------------------------------------------------------------------


def per_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` of each device's own pieces, which lie as the specs say; it may name mesh axes.

    Gradients of an argument that devices share are added up once, at the end. Without a mesh it is `function` itself.
    """
    mesh = current_mesh()
    if mesh is None:
        return function
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {axis for axis, kind in types if kind != AxisType.Manual}
    if not free:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False)


def whole(params: Any, lies: Any) -> Any:
    """Inside `per_device`: as `gather`, of weights whose pieces lie as the specs say."""

    def one(w: jax.Array, spec: PartitionSpec) -> jax.Array:
        for i, axes in _gathered_dimensions(spec):
            w = jax.lax.all_gather(w, axes, axis=i, tiled=True)
        return w

    return params if lies is None else jax.tree.map(one, params, lies)


def add_up(gradients: Any, lies: Any, devices: tuple[str, ...]) -> Any:
    """Inside `per_device`: the sum over `devices` of gradients of `whole` weights, cut into the weights' pieces."""

    def one(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
        for i, axes in _gathered_dimensions(spec):
            gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=i, tiled=True)
        return jax.lax.psum(gradient, tuple(axis for axis in devices if axis not in _all_axes(spec)))

    return gradients if lies is None else jax.tree.map(one, gradients, lies)


def _gathered_dimensions(spec: PartitionSpec) -> list[tuple[int, tuple[str, ...]]]:
    among = [tuple(axis for axis in _axes(entry) if axis in GATHERED) for entry in spec]
    return [(i, axes) for i, axes in enumerate(among) if axes]


def per_stage(function: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """`function` of each pipeline stage's own share, in which the other mesh axes split arrays as they do outside.

    An argument whose first dimension lies first on the stages is split, any other is the same for all of them; results,
    whose PartitionSpecs outside are `out_specs`, are joined along their first dimension.
    """
    mesh = current_mesh()
    assert mesh is not None
    (stages,) = RULES["layers"]
    others = tuple(axis for axis in mesh.axis_names if axis != stages)

    def stages_alone(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(stages) if stages in _axes(spec[0] if spec else None) else PartitionSpec()

    def on_stages(*arguments: Any) -> Any:
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arguments)
        inside_specs = jax.tree.map(lambda spec: _without(spec, (stages,)), specs)
        inside = jax.sharding.explicit_axes(function, axes=others, in_sharding=inside_specs)
        run = jax.shard_map(
            inside,
            in_specs=jax.tree.map(stages_alone, specs),
            out_specs=jax.tree.map(stages_alone, out_specs),
            axis_names={stages},
            check_vma=False,
        )
        # What crosses the border of a shard_map is gathered along Explicit axes that it leaves alone (jax 0.10.2,
        # shard_map.py, _shardy_shard_map_sharding), but not along Auto axes.
        return jax.sharding.auto_axes(run, out_sharding=out_specs)(*arguments)

    return on_stages


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes in an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _all_axes(entries: Iterable[Any]) -> list[str]:
    return [axis for entry in entries for axis in _axes(entry)]


def reshape(x: jax.Array, shape: tuple[int, ...], lying: tuple[Any, ...]) -> jax.Array:
    """Reshape, saying which mesh axes the new dimensions lie on."""
    if current_mesh() is None:
        return jnp.reshape(x, shape)
    sharding = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*(axes or None for axes in lying)))
    return jax.lax.reshape(x, shape, out_sharding=sharding)


def lying(tree: Any) -> Any:
    """A tree of PartitionSpec: how arrays lie on the current mesh; None without one."""
    return None if current_mesh() is None else jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)
