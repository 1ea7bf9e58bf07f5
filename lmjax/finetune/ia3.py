"""(IA)^3: what matrices give is rescaled by learned vectors (Liu et al. 2022, arXiv:2205.05638, section 3.3).

    y = (x W) * l,    and for a matrix that writes to the residual stream    y = (x * l) W

The paper rescales keys, values and the hidden units of the mlp: `tune.adapter.targets=('key', 'value', 'mlp/down')`.
The vectors start at one, where nothing changes.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lmjax.models.read import as_array
from lmjax.train.config import AdapterConfig
from lmjax.weights import Spec, Weight, ones

_STREAM = ("embed",)


@flax.struct.dataclass
class Rescaled:
    """A stored matrix with a vector along its outputs or its inputs: a `Compound` (models/read.py)."""

    base: Any
    by: jax.Array
    inputs: bool = flax.struct.field(pytree_node=False)

    def as_array(self, weight: Weight) -> jax.Array:
        others = weight.out_axes if self.inputs else weight.in_axes
        first = len(weight.batch_axes) + (len(weight.in_axes) if self.inputs else 0)
        by = jnp.expand_dims(self.by, tuple(range(first, first + len(others))))
        return as_array(weight, self.base).astype(jnp.float32) * by

    def map_parts(self, function: Callable[[Weight, Any], Any], weight: Weight) -> "Rescaled":
        by = function(vector(weight), self.by)
        return self.replace(base=function(weight, self.base), by=by)  # type: ignore[attr-defined]

    def multiply(self, x: jax.Array, dot: Callable[..., jax.Array], *, rows_out: bool = False) -> jax.Array:
        assert not rows_out, "only matrices are rescaled"
        if self.inputs:
            return dot(x * self.by.astype(x.dtype), self.base)
        y = dot(x, self.base)
        return y * self.by.astype(y.dtype)

    def lookup(self, rows: Callable[[Any], jax.Array]) -> jax.Array:
        raise AssertionError("only matrices are rescaled")


def fits(weight: Weight) -> bool:
    """Matrices, but those of experts, whose rows are mixed."""
    return weight.kind == "matmul" and "experts" not in weight.batch_axes


def rescales_inputs(weight: Weight) -> bool:
    """Whether it writes to the residual stream, and so what it reads is rescaled."""
    return weight.out_axes == _STREAM


def vector(weight: Weight) -> Weight:
    axes, before = weight.out_axes, len(weight.batch_axes)
    middle = before + len(weight.in_axes)
    sizes = weight.sizes[middle:]
    if rescales_inputs(weight):
        axes, sizes = weight.in_axes, weight.sizes[before:middle]
    copies = f"{' '.join(weight.batch_axes)} | " if before else ""
    return Weight(f"{copies}-> {' '.join(axes)}", kind="scale", init=ones, sizes=(*weight.sizes[:before], *sizes))


def weights(weight: Weight, cfg: AdapterConfig) -> Spec:
    return {"by": vector(weight)}


def attached(weight: Weight, cfg: AdapterConfig, base: Any, beside: Any, keys: jax.Array | None) -> Rescaled:
    return Rescaled(base, beside["by"], rescales_inputs(weight))
