"""What a checkpoint's tensors are to our weights: a name, an order of axes, nothing else.

    Tensor("model.layers.{layer}.self_attn.q_proj.weight", "(heads head_dim) embed", ("attention/query",))

says that the tensor of this name holds the weight `attention/query` of that layer, its axes in this order, those in
parentheses merged into one. Reshapes, transpositions, expected shapes and both directions follow from the line and from
the named axes of the `Weight`. Several paths share a tensor along the axis `parts`.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.models.config import Segments, layer_index
from lmjax.weights import Spec, Weight, by_path


class Tensor(NamedTuple):
    """One line of a family's table."""

    name: str
    """May hold {layer} and {expert}; then `paths` start at a layer's weights."""
    layout: str
    paths: tuple[str, ...]


class Place(NamedTuple):
    """Where a tensor's content belongs: an entry of a stacked weight."""

    path: str
    weight: Weight
    entry: tuple[int, ...]
    """The indices of the entry along the weight's batch axes."""


class Expected(NamedTuple):
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    layout: str
    places: tuple[Place, ...]


def tensor(name: str, layout: str, *paths: str) -> Tensor:
    return Tensor(name, layout, paths)


def expected(table: Sequence[Tensor], spec: Spec, segments: Segments) -> dict[str, Expected]:
    """Every tensor that a checkpoint of this model has, by name, in the order of the table.

    A line whose weights the model lacks (biases, an untied head) is left out; every weight has its line.
    """
    weights = by_path(spec)
    found: dict[str, Expected] = {}
    for line in table:
        for where, names in _layers(line, segments):
            places = [where + path for path in line.paths]
            if all(path in weights for path in places):
                found |= {one.name: one for one in _entries(line, weights, places, names)}
    covered = {place.path for one in found.values() for place in one.places}
    assert covered == set(weights), f"the table says nothing of {sorted(set(weights) - covered)}"
    return found


def _layers(line: Tensor, segments: Segments) -> Iterator[tuple[str, dict[int, int]]]:
    """(prefix of the paths, {repeat: layer}) of each stack of layers; one empty prefix for what is no layer's."""
    if "{layer}" not in line.name:
        yield "", {}
        return
    for segment, (period, repeats) in enumerate(segments):
        for place in range(len(period)):
            layers = {repeat: layer_index(segments, segment, repeat, place) for repeat in range(repeats)}
            yield f"segments/{segment}/{place}/", layers


def _entries(
    line: Tensor, weights: dict[str, Weight], paths: Sequence[str], layers: dict[int, int]
) -> Iterator[Expected]:
    first = weights[paths[0]]
    batch = first.shape[: len(first.batch_axes)]
    for index in np.ndindex(*batch):
        names = {"layer": layers[index[0]]} if layers else {}
        if len(index) > len(names):
            names["expert"] = index[len(names)]
        yield Expected(
            line.name.format(**names),
            merged_shape(line.layout, first, len(paths)),
            line.layout,
            tuple(Place(path, weights[path], index) for path in paths),
        )


# Layouts ----------------------------------------------------------------------------------------------------------


def _sizes(weight: Weight, parts: int) -> dict[str, int]:
    one = weight.unstacked()
    return {"parts": parts, **dict(zip(one.names, one.shape, strict=True))}


def merged_shape(layout: str, weight: Weight, parts: int) -> tuple[int, ...]:
    sizes = _sizes(weight, parts)
    groups = re.findall(r"\(([^)]*)\)|(\S+)", layout)
    return tuple(math.prod(sizes[axis] for axis in (merged or single).split()) for merged, single in groups)


def _order(one: Expected) -> tuple[list[str], list[str]]:
    """The axes as the tensor has them, and as we do: `parts` first, then those of the weight."""
    theirs = re.findall(r"\w+", one.layout)
    ours = [*(["parts"] if "parts" in theirs else []), *one.places[0].weight.unstacked().names]
    assert sorted(theirs) == sorted(ours), f"{one.name}: the layout '{one.layout}' has other axes than {ours}"
    return theirs, ours


def split(one: Expected, x: Any) -> list[Any]:
    """A tensor as they have it -> views of it as we do, one for each place."""
    theirs, ours = _order(one)
    sizes = _sizes(one.places[0].weight, len(one.places))
    x = x.reshape([sizes[axis] for axis in theirs]).transpose([theirs.index(axis) for axis in ours])
    return list(x) if ours[:1] == ["parts"] else [x]


def join(one: Expected, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `split`."""
    theirs, ours = _order(one)
    x = np.stack(parts) if ours[:1] == ["parts"] else parts[0]
    return x.transpose([ours.index(axis) for axis in theirs]).reshape(one.shape)
