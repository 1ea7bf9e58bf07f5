"""Text generation on a mesh: rows are spread over its devices, weights stay where they are.

Training says where each array lies (jax's Explicit axes). That fits batches which the mesh divides, of long rows; here
are any number of rows and one token of each. So the same mesh is entered once more, with Auto axes: lmjax's layout
functions then do nothing, as on one device, and XLA finds the layouts that follow from those of the weights and rows.

Without a mesh every function here does nothing.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.devices.mesh import SHARDING_RULES, all_axes, axes_of, current_mesh, mesh_axes
from lmjax.devices.place import use_mesh
from lmjax.generate.small import small_weights
from lmjax.models.model import Model
from lmjax.models.read import each_array
from lmjax.process import group
from lmjax.weights import Params, Weight, map_weights


def auto_mesh() -> Mesh | None:
    """The mesh that `jax.set_mesh` entered, with Auto axes; None without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    current_mesh()  # which refuses foreign ones
    mesh = jax.sharding.get_mesh()
    return Mesh(mesh.devices, mesh.axis_names)


# On the host ------------------------------------------------------------------------------------------------------


class Ready(NamedTuple):
    """Weights that `decoding_weights` made before, for all calls that generate by them."""

    weights: Params


def decoding_weights(model: Model, params: Params | Ready, mesh: Mesh | None, bits: str | None = None) -> Params:
    """The weights as the decoding loop wants them, a layer's apart from another's, each on the devices that it is on;
    matrices in fewer bits where `bits` is a name of those in small.py.

    Where stages of a pipeline hold the layers, they split `embed` instead: every layer runs on all devices. Weights
    that are on no mesh are copied to every device.
    """
    if isinstance(params, Ready):
        return params.weights
    if mesh is None:
        return model.unstack(params if bits is None else small_weights(model, params, bits))
    specs = jax.tree.map(_partition, params)
    if {*SHARDING_RULES["layers"]} & {*all_axes(itertools.chain.from_iterable(jax.tree.leaves(specs)))}:
        specs = map_weights(functools.partial(each_array, functools.partial(_off_stages, mesh)), model.spec, specs)
    with use_mesh(mesh):
        params = jax.tree.map(lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec)), params, specs)
        if bits is not None:
            params = small_weights(model, group.wait_on_cpu(params), bits)
        return group.wait_on_cpu(model.unstack(group.wait_on_cpu(params)))


def _partition(w: Any) -> PartitionSpec:
    """The PartitionSpec of a weight; one that is on no mesh is whole on every device."""
    sharding = getattr(w, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _off_stages(mesh: Mesh, weight: Weight, specs: PartitionSpec) -> PartitionSpec:
    """Split `embed` over the stages, as fsdp does: where all weights do so, XLA sends activations, not weights."""
    stages = SHARDING_RULES["layers"]
    axes = {name: axes_of(entry) for name, entry in itertools.zip_longest(weight.names, specs)}
    axes = {name: tuple(axis for axis in of_name if axis not in stages) for name, of_name in axes.items()}
    sizes = dict(zip(weight.names, weight.shape, strict=True))
    if "embed" in axes and sizes["embed"] % _pieces((*stages, *axes["embed"]), mesh) == 0:
        axes["embed"] = (*stages, *axes["embed"])
    return PartitionSpec(*(of_name or None for of_name in axes.values()))


# Inside a program -------------------------------------------------------------------------------------------------


def spread_rows(tree: Any) -> Any:
    """Lay rows, the first axis of every array, over as many devices as divide them; XLA lays out the other axes."""

    def spread(x: jax.Array, mesh: Any) -> jax.Array:
        axes = [*mesh_axes("batch", mesh), *mesh_axes("time", mesh)]  # no row has enough tokens to be shared
        while len(x) % _pieces(axes, mesh):
            axes.pop()
        others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(tuple(axes) or None, *others))

    return _on_mesh(spread, tree)


def row_pieces(mesh: Mesh | None) -> int:
    """Over how many groups of devices `spread_rows` lays rows, if there are enough."""
    return 1 if mesh is None else _pieces([*mesh_axes("batch", mesh), *mesh_axes("time", mesh)], mesh)


def replicate(tree: Any) -> Any:
    """Give every device all of every array, so that every process can read it."""
    return _on_mesh(lambda x, _: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def _on_mesh(lay_out: Callable[[jax.Array, Any], jax.Array], tree: Any) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.tree.map(lambda x: lay_out(x, mesh), tree)


def _pieces(axes: Iterable[str], mesh: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
