"""DoRA: what LoRA changes is a weight's direction; its magnitude is learned by itself (Liu et al. 2024,
arXiv:2402.09353, equation 5).

    y = x W' * m / |W'|,    W' = W + scale A B

|W'| are the lengths of the columns of W', one for each output. No gradient flows through them (section 4.3). At the
start m = |W| and B = 0: what is computed is what the frozen model computes, but for the rounding of m / |W|.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lmjax.devices.gather import constant, gather
from lmjax.finetune import low_rank
from lmjax.finetune.low_rank import LowRank
from lmjax.models.read import as_array
from lmjax.train.config import AdapterConfig
from lmjax.weights import Params, Spec, Weight, ones


@flax.struct.dataclass
class Decomposed:
    """A stored weight with two factors, and how long its columns are to be: a `Compound` (models/read.py)."""

    direction: LowRank
    magnitude: jax.Array
    """float32, with the axes of the outputs."""

    def as_array(self, weight: Weight) -> jax.Array:
        w, inputs = self.direction.as_array(weight), inputs_of(weight)
        return w * jnp.expand_dims(ratio(self.magnitude, w, inputs), inputs)

    def map_parts(self, function: Callable[[Weight, Any], Any], weight: Weight) -> "Decomposed":
        return self.replace(  # type: ignore[attr-defined]
            direction=self.direction.map_parts(function, weight),
            magnitude=function(magnitudes(weight), self.magnitude),
        )

    def multiply(self, x: jax.Array, dot: Callable[..., jax.Array], *, rows_out: bool = False) -> jax.Array:
        assert not rows_out, "a table that is the head, too, has no magnitudes"
        y = self.direction.multiply(x, dot)
        return y * self._ratio().astype(y.dtype)

    def lookup(self, rows: Callable[[Any], jax.Array]) -> jax.Array:
        x = self.direction.lookup(rows)
        return x * self._ratio().astype(x.dtype)

    def _ratio(self) -> jax.Array:
        parts = (self.direction.base, self.direction.down, self.direction.up)
        w, down, up = (constant(x).astype(jnp.float32) for x in parts)
        changed = w + self.direction.scale * jnp.tensordot(down, up, axes=1)
        return ratio(self.magnitude, changed, tuple(range(w.ndim - self.magnitude.ndim)))


def ratio(magnitude: jax.Array, w: jax.Array, inputs: tuple[int, ...]) -> jax.Array:
    """m / |w|; a column of zeros stays one."""
    return magnitude / jnp.maximum(gather(lengths(w, inputs)), jnp.finfo(jnp.float32).tiny)


def lengths(w: jax.Array, inputs: tuple[int, ...]) -> jax.Array:
    """Of the columns of a matrix, which lie along these axes of it."""
    return jnp.sqrt(jnp.sum(jnp.square(w.astype(jnp.float32)), axis=inputs))


def inputs_of(weight: Weight) -> tuple[int, ...]:
    first = len(weight.batch_axes)
    return tuple(range(first, first + len(weight.in_axes)))


def fits(weight: Weight) -> bool:
    """What LoRA fits, but experts, whose rows are mixed, and a table that is the head, too: its rows are outputs there,
    its columns where tokens are looked up."""
    return low_rank.fits(weight) and "experts" not in weight.batch_axes and not weight.tied


def magnitudes(weight: Weight) -> Weight:
    first, out = len(weight.batch_axes), len(weight.out_axes)
    copies = f"{' '.join(weight.batch_axes)} | " if first else ""
    sizes = (*weight.sizes[:first], *weight.sizes[-out:])
    return Weight(f"{copies}-> {' '.join(weight.out_axes)}", kind="scale", init=ones, sizes=sizes)


def weights(weight: Weight, cfg: AdapterConfig) -> Spec:
    return {**low_rank.weights(weight, cfg), "magnitude": magnitudes(weight)}


def start(weight: Weight, base: Any) -> Params:
    """The lengths that the columns of a stored weight have."""
    return {"magnitude": lengths(as_array(weight, base), inputs_of(weight))}


def attached(weight: Weight, cfg: AdapterConfig, base: Any, beside: Any, keys: jax.Array | None) -> Decomposed:
    """The weight as the model reads it.

    Dropout acts on what A reads. The authors' code, and PEFT, drop entries of the x in (m / |W'| - 1) x W, too, for
    which they multiply by W twice.
    """
    return Decomposed(low_rank.attached(weight, cfg, base, beside, keys), beside["magnitude"])
