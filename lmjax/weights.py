"""A weight is declared once; everything else is derived from the declaration.

    spec = bind({"query": Weight("embed -> heads head_dim"), ...}, {"embed": 128, "heads": 2, "head_dim": 64})

`axes` names what goes in and what comes out. From a `Spec` (a nested dict of `Weight`) follow shapes, initialization,
sharding (devices/), parameter counts, optimizer routing and decay masks (optim/), checkpoint paths and FLOPs
(models/flops.py). Params are the same nested dict holding arrays.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lmjax.errors import ConfigError

Kind = Literal["matmul", "lookup", "scale", "bias", "buffer"]
Spec = dict[str, Any]  # nested dict of Weight
Params = dict[str, Any]  # the same nested dict of arrays
Initializer = Callable[[jax.Array, "Weight"], jax.Array]


def fan_in(key: jax.Array, weight: "Weight") -> jax.Array:
    """Normal with variance 1 / fan-in: the output of a matmul has the variance of its input.

    Of a parametrized weight it is the fan-in at the base shape, and the rest is the parametrization's.
    """
    return jax.random.normal(key, weight.shape) * max(1, weight.fan_in / weight.scaling.grown_in) ** -0.5


def normal(std: Any) -> Initializer:
    return lambda key, weight: jax.random.normal(key, weight.shape) * std


def zeros(key: jax.Array, weight: "Weight") -> jax.Array:
    return jnp.zeros(weight.shape)


def ones(key: jax.Array, weight: "Weight") -> jax.Array:
    return jnp.ones(weight.shape)


class Scaling(NamedTuple):
    """What a parametrization says of one weight: factors over what holds at the base shape, where all are 1.

    parametrization.py has the table that they come from.
    """

    kind: str | None = None
    """The row of that table; None for a weight that is not parametrized."""
    grown_in: float = 1.0
    """How large the input side is, over that of the base shape."""
    grown_out: float = 1.0
    """How large the output side is, over that of the base shape."""
    std: float = 1.0
    """The factor on the standard deviation of the initial values."""
    gradient: float = 1.0
    """The factor on the gradient that the optimizer sees: its entries then are as large as at the base shape."""
    rate: float = 1.0
    """The factor on the learning rate, but not on what weight decay takes away."""
    logits: float = 1.0
    """The factor on the logits that the weight makes."""


UNSCALED = Scaling()


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight: `"layers | embed -> heads head_dim"` reads `batch axes | axes in -> axes out`.

    Batch axes are independent copies: a stack of layers behaves in every respect like the single weights it holds.
    An axis name appears once per weight: a square matrix names its two sides differently.
    """

    axes: str
    kind: Kind = "matmul"
    init: Initializer = fan_in
    tied: bool = False
    """A lookup that is also used, transposed, as a matmul (the output head reads the embedding)."""
    active: int | None = None
    """How many of the copies along the last batch axis a token passes through; None means all."""
    float32: bool = False
    """Multiplied in float32 whatever the model computes in."""
    sizes: tuple[int, ...] = ()
    scaling: Scaling = UNSCALED

    @property
    def batch_axes(self) -> tuple[str, ...]:
        return tuple(self.axes.split("|")[0].split()) if "|" in self.axes else ()

    @property
    def in_axes(self) -> tuple[str, ...]:
        return tuple(self.axes.split("|")[-1].split("->")[0].split())

    @property
    def out_axes(self) -> tuple[str, ...]:
        return tuple(self.axes.split("->")[1].split())

    @property
    def names(self) -> tuple[str, ...]:
        """The axis name of each array dimension."""
        return self.batch_axes + self.in_axes + self.out_axes

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.sizes, f"weight '{self.axes}' is not bound to sizes yet"
        return self.sizes

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def active_size(self) -> int:
        """The entries that a token passes through."""
        if self.active is None:
            return self.size
        copies = self.shape[len(self.batch_axes) - 1]
        return self.size // copies * self.active

    @property
    def fan_in(self) -> int:
        start = len(self.batch_axes)
        return math.prod(self.shape[start : start + len(self.in_axes)])

    @property
    def trainable(self) -> bool:
        return self.kind != "buffer"

    def unstacked(self) -> "Weight":
        """The same weight without its batch axes: one of its copies."""
        axes = self.axes.split("|")[-1].strip()
        return dataclasses.replace(self, axes=axes, sizes=self.sizes[len(self.batch_axes) :], active=None)

    def of_layer(self) -> "Weight":
        """The same weight without the axis that `stacked` put in front: what one layer sees."""
        assert self.batch_axes, f"'{self.axes}' is not stacked"
        axes = self.axes.removeprefix(self.batch_axes[0]).lstrip(" |")
        return dataclasses.replace(self, axes=axes, sizes=self.sizes[1:])

    def scaled(self, scaling: Scaling) -> "Weight":
        return dataclasses.replace(self, scaling=scaling)


def map_weights(function: Callable[..., Any], spec: Spec, *trees: Any) -> Any:
    """`jax.tree.map` over the weights of a spec (and trees of the same structure)."""
    return jax.tree.map(function, spec, *trees, is_leaf=lambda x: isinstance(x, Weight))


def by_path(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree as one flat dict, `{"segments/0/0/attention/query": leaf}`."""
    return flatten_dict(dict(tree), sep="/")


def nested(leaves: Mapping[str, Any]) -> Any:
    """The inverse of `by_path`."""
    return unflatten_dict(dict(leaves), sep="/")


def part(tree: Mapping[str, Any], like: Mapping[str, Any]) -> Any:
    """The leaves of a nested dict at the paths that another one has."""
    return {name: part(tree[name], one) if isinstance(one, Mapping) else tree[name] for name, one in like.items()}


def merge(base: Params, more: Params) -> Params:
    """One nested dict of both; they may share inner nodes, but no leaf."""
    both = base.keys() & more.keys()
    assert all(isinstance(base[name], dict) and isinstance(more[name], dict) for name in both), sorted(both)
    return {**base, **more, **{name: merge(base[name], more[name]) for name in both}}


def bind(spec: Spec, dims: Mapping[str, int]) -> Spec:
    """Give every axis of every weight its size. Raises ConfigError for an axis that is not positive."""
    for name, size in dims.items():
        if size <= 0:
            raise ConfigError(f"model: the axis '{name}' has size {size}; it must be positive")

    def bind_one(weight: Weight) -> Weight:
        assert len(set(weight.names)) == len(weight.names), f"an axis appears twice in '{weight.axes}'"
        return dataclasses.replace(weight, sizes=tuple(dims[name] for name in weight.names))

    return map_weights(bind_one, spec)


def stacked(spec: Spec, layers: int, axis: str = "layers") -> Spec:
    """The spec of `layers` copies of every weight, on a leading batch axis of that name."""

    def stack(weight: Weight) -> Weight:
        axes = f"{axis} {weight.axes}" if weight.batch_axes else f"{axis} | {weight.axes}"
        return dataclasses.replace(weight, axes=axes, sizes=(layers, *weight.shape))

    return map_weights(stack, spec)


def abstract(spec: Spec, dtype: Any = jnp.float32) -> Params:
    """Shapes and dtypes without memory: a tree of `jax.ShapeDtypeStruct`."""
    return map_weights(lambda weight: jax.ShapeDtypeStruct(weight.shape, dtype), spec)


def initialize(spec: Spec, key: jax.Array) -> Params:
    """Float32 values for every weight.

    A weight's key depends on its path alone, and a layer's on its place in the stack, so that adding a weight or
    another layer never changes the others.
    """
    return map_with_path(lambda path, weight: _initialize_one(jax.random.fold_in(key, path_hash(path)), weight), spec)


def _initialize_one(key: jax.Array, weight: Weight) -> jax.Array:
    single = weight.unstacked()
    copies = math.prod(weight.shape[: len(weight.batch_axes)])
    keys = jax.vmap(lambda copy: jax.random.fold_in(key, copy))(jnp.arange(copies))
    values = jax.vmap(lambda copy_key: single.init(copy_key, single))(keys).reshape(weight.shape)
    return times(values, weight.scaling.std)


def times(x: jax.Array, factor: float) -> jax.Array:
    """x * factor, and x itself for 1: a factor that a model does not have is in no program."""
    return x if factor == 1 else x * factor


def path_hash(path: str) -> int:
    """A stable 31-bit number for a name, to fold into a key."""
    return zlib.crc32(path.encode()) & 0x7FFFFFFF


def map_with_path(function: Callable[[str, Weight], Any], spec: Spec, prefix: str = "") -> Any:
    """The same nested dict of `function(path, weight)`."""
    return {
        name: function(prefix + name, child)
        if isinstance(child, Weight)
        else map_with_path(function, child, f"{prefix}{name}/")
        for name, child in spec.items()
    }


def decays(weight: Weight) -> bool:
    """Weight decay pulls on matrices and tables, not on scales and biases."""
    return weight.kind in ("matmul", "lookup")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameter counts. Scaling-law papers differ in which one they call N, so all are always reported."""

    total: int
    non_embedding: int
    """Total minus the lookup tables (Kaplan et al. 2020); a tied table counts as embedding."""
    matmul: int
    """Weights that multiply a token: matmuls, of experts those chosen, and a tied table once as the output head."""
    active: int
    """Total minus the experts that a token does not pass through; the N of 6ND. Equals the total without experts."""


def count(spec: Spec) -> Counts:
    weights = [weight for weight in by_path(spec).values() if weight.trainable]
    lookups = sum(weight.size for weight in weights if weight.kind == "lookup")
    matmuls = sum(weight.active_size for weight in weights if weight.kind == "matmul" or weight.tied)
    total = sum(weight.size for weight in weights)
    active = sum(weight.active_size for weight in weights)
    return Counts(total=total, non_embedding=total - lookups, matmul=matmuls, active=active)
