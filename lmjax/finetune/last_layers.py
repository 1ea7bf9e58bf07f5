"""Stacks of layers cut in two: the first ones frozen, the last ones trained.

A stack is one array for each weight, so its layers are trained or frozen together, unless it is cut: each weight is
then two arrays, one among the frozen and one among the trained. In training the model runs one stack after the other
(decoder.run_segment), and no gradient goes into the first.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.errors import ConfigError
from lmjax.models.config import ModelConfig
from lmjax.models.read import as_array
from lmjax.weights import Params, Spec, Weight, by_path, nested

SEGMENTS = "segments"


class Halves(NamedTuple):
    """A stored weight of a stack that is cut."""

    first: Any
    last: Any


def trained_repeats(cfg: ModelConfig, layers: int) -> dict[str, int]:
    """How many of the last repeats of each segment are trained, by its name.

    Raises ConfigError for more layers than there are, and for a number of them that begins within a period.
    """
    possible, after = list[int](), 0
    for period, repeats in reversed(cfg.segments):
        possible += [after + len(period) * (n + 1) for n in range(repeats)]
        after += len(period) * repeats
    if layers not in possible:
        nearest = min(possible, key=lambda n: abs(n - layers))
        why = "begin within a period" if layers < cfg.layers else "are too many"
        raise ConfigError(f"tune.last_layers={layers}: of model.layers={cfg.layers} so many {why}; make it {nearest}")
    left, found = layers, {}
    for segment, (period, repeats) in reversed([*enumerate(cfg.segments)]):
        found[str(segment)] = min(left // len(period), repeats)
        left -= found[str(segment)] * len(period)
    return found


def cuts(spec: Spec, trained: list[str], repeats: Mapping[str, int]) -> dict[str, int]:
    """Of the trained weights those of a stack that is cut, with how many of its repeats are trained; 0 for those that
    are not trained at all."""
    weights, found = by_path(spec), {}
    for path in trained:
        root, _, rest = path.partition("/")
        if root == SEGMENTS:
            count = repeats[rest.partition("/")[0]]
            if count < weights[path].shape[0]:
                found[path] = count
    return found


def sized(weight: Weight, layers: int) -> Weight:
    """The declaration of so many of a stack's layers."""
    return Weight(**{**vars(weight), "sizes": (layers, *weight.shape[1:])})


def joined(spec: Spec, held: Mapping[str, Any]) -> Params:
    """Whole stacks, as arrays."""
    weights = by_path(spec)

    def whole(path: str, one: Any) -> Any:
        if not isinstance(one, Halves):
            return one
        return jnp.concatenate([as_array(weights[path], part).astype(jnp.float32) for part in one])

    everything: Params = nested({path: whole(path, one) for path, one in held.items()})
    return everything


def one_after_the_other(held: Mapping[str, Any]) -> Params:
    """Each segment with a cut stack as two, (first, last), as training runs it."""
    everything: Params = nested(held)
    for name, segment in everything[SEGMENTS].items():
        halves = [one for one in by_path(segment).values() if isinstance(one, Halves)]
        if halves:
            first = len(jax.tree.leaves(halves[0].first)[0])
            everything[SEGMENTS][name] = tuple(
                nested({path: _half(one, first, part) for path, one in by_path(segment).items()}) for part in (0, 1)
            )
    return everything


def _half(stored: Any, first: int, part: int) -> Any:
    if isinstance(stored, Halves):
        return stored[part]
    return jax.tree.map(lambda w: w[first:] if part else w[:first], stored)
