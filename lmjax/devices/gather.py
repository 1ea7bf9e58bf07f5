"""Weights as the devices that share them use them: gathered before, their gradients scattered after.

Without a mesh every function here does nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from lmjax.devices.mesh import GATHER, GATHERED, RULES, Names, all_axes, axes_of, current_mesh, mesh_axes
from lmjax.weights import Spec, Weight, map_weights


def whole_copies(x: jax.Array, batch_axes: Names) -> jax.Array:
    """Lay each copy in a stack whole on one device: the stack's first axis is spread over as many of the mesh axes that
    a copy was split over as divide it; along the others every device holds all of them."""
    mesh = current_mesh()
    if mesh is None:
        return x
    spec, front = jax.typeof(x).sharding.spec, [mesh_axes(name) for name in batch_axes]
    spread = all_axes(spec[len(front) :]) if front else []
    while spread and len(x) % math.prod(mesh.shape[axis] for axis in (*front[0], *spread)):
        spread.pop()
    entries = [(*axes, *(spread if i == 0 else ())) or None for i, axes in enumerate(front)]
    return jax.sharding.reshard(x, PartitionSpec(*entries, *(None for _ in range(x.ndim - len(front)))))


def gather(params: Any, spec: Spec | None = None) -> Any:
    """Weights as a layer uses them: whole along fsdp and context, still split along tensor and expert.

    Gradients come back split like the weights. That of a matrix of `spec` stays a sum that is not yet added up (jax's
    type `unreduced`) until a reduce-scatter has cut it into pieces: only those are then added up over the mesh axes
    along which devices hold other tokens and the same piece. Inside a pipeline's stage, where jax 0.10.2 has no such
    types, XLA is left to find that out. Experts are left to `all_gather`.
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
    lies = PartitionSpec(*spec, reduced=summed - {*all_axes(spec)})
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
    return PartitionSpec(*(tuple(axis for axis in axes_of(entry) if axis not in axes) or None for entry in spec))


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


def all_gather(params: Any, lies: Any) -> Any:
    """Inside `per_device`: as `gather`, of weights whose pieces lie as the specs say."""

    def one(w: jax.Array, spec: PartitionSpec) -> jax.Array:
        for i, axes in _gathered_dimensions(spec):
            w = jax.lax.all_gather(w, axes, axis=i, tiled=True)
        return w

    return params if lies is None else jax.tree.map(one, params, lies)


def reduce_scatter(gradients: Any, lies: Any, devices: tuple[str, ...]) -> Any:
    """Inside `per_device`: the sum over `devices` of the gradients of gathered weights, cut into their pieces."""

    def one(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
        for i, axes in _gathered_dimensions(spec):
            gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=i, tiled=True)
        return jax.lax.psum(gradient, tuple(axis for axis in devices if axis not in all_axes(spec)))

    return gradients if lies is None else jax.tree.map(one, gradients, lies)


def _gathered_dimensions(spec: PartitionSpec) -> list[tuple[int, tuple[str, ...]]]:
    among = [tuple(axis for axis in axes_of(entry) if axis in GATHERED) for entry in spec]
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
        return PartitionSpec(stages) if stages in axes_of(spec[0] if spec else None) else PartitionSpec()

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
