"""All-gather sharded weights before they are used, and reduce-scatter their gradients afterwards.

Without a mesh every function here does nothing.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from lmjax.devices.mesh import GATHER, GATHERED, SHARDING_RULES, Names, all_axes, axes_of, current_mesh, mesh_axes
from lmjax.weights import Weight, map_weights


def gather_copies(x: jax.Array, batch_axes: Names) -> jax.Array:
    """Reshard a stack of matrices so that no matrix is cut: the stack's first axis is sharded instead.

    `batch_axes` are the names of the stack's axes. The first is sharded along as many of the mesh axes that cut a
    matrix as divide its length; along the others the stack is replicated.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    spec, front = jax.typeof(x).sharding.spec, [mesh_axes(name) for name in batch_axes]
    spread = all_axes(spec[len(front) :]) if front else []
    while spread and len(x) % math.prod(mesh.shape[axis] for axis in (*front[0], *spread)):
        spread.pop()
    entries = [(*axes, *(spread if i == 0 else ())) or None for i, axes in enumerate(front)]
    return jax.sharding.reshard(x, PartitionSpec(*entries, *(None for _ in range(x.ndim - len(front)))))


def gather(params: Any, spec: Any = None) -> Any:
    """All-gather weights along fsdp and context for use in a layer; they stay sharded along tensor and expert.

    Gradients come back sharded as the weights are. With `spec`, the gradient of a matrix is a sum over devices that
    jax does not carry out at once (its type is `unreduced`). A reduce-scatter first cuts it into shards, and only
    shards are added up over the mesh axes along which devices hold other tokens and the same shard. Inside a pipeline
    stage jax 0.10.2 has no such types, and this is left to XLA. Experts of `spec` are returned as they are:
    `all_gather` gathers them.
    """
    mesh = current_mesh()
    if mesh is None:
        return params
    if spec is None:
        return jax.tree.map(_gather, params)

    def gather_by_kind(weight: Weight, w: jax.Array) -> jax.Array:
        if "experts" in weight.names:
            return w
        return _gather_unreduced(w) if weight.kind == "matmul" and not mesh.manual_axes else _gather(w)

    return map_weights(gather_by_kind, spec, params)


def _gather(w: jax.Array) -> jax.Array:
    return checkpoint_name(jax.sharding.reshard(w, _without(jax.typeof(w).sharding.spec, GATHERED)), GATHER)


def constant(w: jax.Array) -> jax.Array:
    """A gathered weight as a value without a gradient, whose type says nothing of one either."""
    w = jax.lax.stop_gradient(w)
    return (
        w if current_mesh() is None else jax.sharding.reshard(w, PartitionSpec(*jax.typeof(w).sharding.spec.partitions))
    )


def _gather_unreduced(w: jax.Array) -> jax.Array:
    """All-gather a matrix so that its gradient has the type `unreduced`.

    For that the matrix has the type `reduced` along every mesh axis that tokens are sharded along.
    """
    spec = jax.typeof(w).sharding.spec
    token_axes = {*mesh_axes("batch"), *mesh_axes("time")}
    shard_spec = PartitionSpec(*spec, reduced=token_axes - {*all_axes(spec)})
    w = jax.sharding.reshard(w, shard_spec)
    gathered = _gathered_dimensions(spec)
    if gathered:
        ((dimension, axes),) = gathered
        full_spec = PartitionSpec(*_without(spec, GATHERED), reduced=token_axes)
        local = functools.partial(_all_gather_reduced, dimension=dimension, axes=axes)
        w = jax.shard_map(local, in_specs=shard_spec, out_specs=full_spec)(w)
    return checkpoint_name(w, GATHER)


def _all_gather_reduced(w: jax.Array, dimension: int, axes: tuple[str, ...]) -> jax.Array:
    rows = jnp.moveaxis(w, dimension, 0)  # TPUs cannot scatter every number of columns
    matrix = jax.lax.all_gather(rows.reshape(len(rows), -1), axes, tiled=True, to="reduced")
    return jnp.moveaxis(matrix.reshape(-1, *rows.shape[1:]), 0, dimension)


def _without(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(tuple(axis for axis in axes_of(entry) if axis not in axes) or None for entry in spec))


def per_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Run `function` on every device with the device's own shards, as the PartitionSpecs cut them (`jax.shard_map`).

    `function` may use collectives over mesh axes. The gradient of a replicated argument is added up over devices once,
    at the end. Without a mesh the result is `function` itself.
    """
    mesh = current_mesh()
    if mesh is None:
        return function
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {axis for axis, kind in types if kind != AxisType.Manual}
    if not free:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False)


def all_gather(params: Any, specs: Any) -> Any:
    """A `gather` for use inside `per_device`: shards of weights, laid out by `specs` -> the gathered weights."""

    def gather_one(w: jax.Array, spec: PartitionSpec) -> jax.Array:
        for dimension, axes in _gathered_dimensions(spec):
            w = jax.lax.all_gather(w, axes, axis=dimension, tiled=True)
        return w

    return params if specs is None else jax.tree.map(gather_one, params, specs)


def reduce_scatter(gradients: Any, specs: Any, devices: tuple[str, ...]) -> Any:
    """Inside `per_device`: gradients of gathered weights -> their sums over `devices`, each device with its own shard.

    `specs` are the PartitionSpecs of the weights, and `devices` the mesh axes along which tokens are sharded.
    """

    def scatter_one(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
        for dimension, axes in _gathered_dimensions(spec):
            gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(gradient, tuple(axis for axis in devices if axis not in all_axes(spec)))

    return gradients if specs is None else jax.tree.map(scatter_one, gradients, specs)


def _gathered_dimensions(spec: PartitionSpec) -> list[tuple[int, tuple[str, ...]]]:
    """The dimensions that are gathered, each with the mesh axes along which it is sharded."""
    among = [tuple(axis for axis in axes_of(entry) if axis in GATHERED) for entry in spec]
    return [(dimension, axes) for dimension, axes in enumerate(among) if axes]


def per_stage(function: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """Run `function` on every pipeline stage with the stage's own shards (`jax.shard_map` over the stages alone).

    An argument whose first dimension is sharded along the stages is cut, any other is replicated. Inside, arrays keep
    their sharding along all other mesh axes. Results, whose PartitionSpecs outside are `out_specs`, are joined along
    their first dimension if that is sharded along the stages.
    """
    mesh = current_mesh()
    assert mesh is not None
    (stages,) = SHARDING_RULES["layers"]
    others = tuple(axis for axis in mesh.axis_names if axis != stages)

    def run(*arguments: Any) -> Any:
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arguments)
        inside_specs = jax.tree.map(lambda spec: _without(spec, (stages,)), specs)
        inside = jax.sharding.explicit_axes(function, axes=others, in_sharding=inside_specs)
        mapped = jax.shard_map(
            inside,
            in_specs=jax.tree.map(_along_stages, specs),
            out_specs=jax.tree.map(_along_stages, out_specs),
            axis_names={stages},
            check_vma=False,
        )
        # jax 0.10.2 gathers the arguments and results of a shard_map along Explicit axes that are not among its
        # `axis_names` (shard_map.py, _shardy_shard_map_sharding), but not along Auto axes.
        return jax.sharding.auto_axes(mapped, out_sharding=out_specs)(*arguments)

    return run


def _along_stages(spec: PartitionSpec) -> PartitionSpec:
    """What a PartitionSpec says of the pipeline's stages, which may cut the first dimension."""
    (stages,) = SHARDING_RULES["layers"]
    return PartitionSpec(stages) if stages in axes_of(spec[0] if spec else None) else PartitionSpec()
