"""How a layer gets the weight that it multiplies by from the weight as it is stored.

A weight is stored as an array, or as a pytree whose arrays have the weight's batch axes in front, with a method
`as_array(weight)` that gives the array which it stands for, as of one that is quantised. A weight of several parts that
are multiplied by one after the other, as of a matrix with an adapter beside it, is a `Compound`.

The embedding table and the output head are gathered elsewhere (layers.lookup_tokens, losses.py).
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax

from lmjax.devices.gather import gather
from lmjax.weights import Params, Spec, Weight, map_weights


class Compound(Protocol):
    """A weight that multiplies otherwise than by one array."""

    def as_array(self, weight: Weight) -> jax.Array:
        """The array that does the same. Raises ConfigError where no array does."""

    def map_parts(self, function: Callable[[Weight, Any], Any], weight: Weight) -> "Compound":
        """The same with `function(declaration, part)` in place of each part; `weight` declares the whole."""

    def multiply(self, x: jax.Array, dot: Callable[..., jax.Array], *, rows_out: bool = False) -> jax.Array:
        """The product, by way of `dot(x, w)` for an array w: see models/linear.py."""

    def lookup(self, rows: Callable[[Any], jax.Array]) -> jax.Array:
        """Rows of the table, by way of `rows(table)` for an array."""


def read(spec: Any, stored: Any, dtype: str) -> Any:
    """Stored weights (one, or a tree of them, as `spec` is) as a layer uses them: arrays, or compounds of arrays, cast
    to `dtype`, gathered.

    Experts come back split over their devices: a mixture gathers them where it uses them.
    """

    def ready(weight: Weight, w: jax.Array) -> jax.Array:
        array: jax.Array = gather(cast(weight, w, dtype), weight)
        return array

    return map_weights(functools.partial(each_array, ready), spec, stored)


def ready_for_lookup(weight: Weight, w: jax.Array, *, dtype: str) -> jax.Array:
    """A table as it is, which `lookup_tokens` gathers; a matrix that its rows are multiplied by cast and gathered.

    Rows are sharded otherwise than what layers read, so its gradient is left to XLA to add up.
    """
    array: jax.Array = w if weight.kind == "lookup" else gather(cast(weight, w, dtype))
    return array


def each_array(function: Callable[[Weight, jax.Array], Any], weight: Weight, stored: Any) -> Any:
    """`function(weight, array)` of a stored weight; of a compound, that of each of its parts, as a compound."""
    if hasattr(stored, "map_parts"):
        return stored.map_parts(functools.partial(each_array, function), weight)
    return function(weight, as_array(weight, stored))


def as_array(weight: Weight, stored: Any) -> jax.Array:
    """The array that a stored weight stands for. It is called where the weight is read, layer by layer."""
    return stored.as_array(weight) if hasattr(stored, "as_array") else stored


def cast_once(weight: Weight, stored: Any, dtype: str) -> Any:
    """A stored weight whose arrays are cast already, so that `cast` has nothing left to do. What is held in fewer bits
    stays so."""
    if hasattr(stored, "map_parts"):
        return stored.map_parts(functools.partial(cast_once, dtype=dtype), weight)
    return stored if hasattr(stored, "as_array") else cast(weight, stored, dtype)


def cast(weight: Weight, w: jax.Array, dtype: str) -> jax.Array:
    """Matrices are multiplied in `dtype`, but for those declared float32; all other weights stay in float32."""
    return w.astype(dtype) if (weight.kind == "matmul" or weight.tied) and not weight.float32 else w


def head(spec: Spec, params: Params) -> Params:
    """The weight that `unembed` reads as an array, or a compound of arrays, not yet gathered: a loss gathers it once
    for all its chunks."""
    name = "unembed" if "unembed" in params else "embed"
    declared = name if name in spec else "embed"  # a tied head may be laid out apart: generate/small.py
    return {name: each_array(lambda _, w: w, spec[declared], params[name])}
