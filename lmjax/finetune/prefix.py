"""Prefix tuning: trained keys and values of each layer, in front of every text (Li and Liang 2021, arXiv:2101.00190).

Attention sees them as it would those of tokens read before; they stand as they are trained, neither normed nor rotated.
The paper makes them by a network, which is thrown away after training; here they are trained themselves. They are no
weights of the model, so nothing can be merged. How they get in front of a text: models/front.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax

from lmjax.errors import ConfigError
from lmjax.train.config import AdapterConfig
from lmjax.weights import Spec, Weight, normal


@flax.struct.dataclass
class Prefixed:
    """A stored matrix that makes keys, or values, with those in front: a `Compound` (models/read.py)."""

    base: Any
    prefix_PKH: jax.Array
    """Layers in front, as those of the matrix."""

    @property
    def places(self) -> int:
        return self.prefix_PKH.shape[-3]

    def as_array(self, weight: Weight) -> jax.Array:
        raise ConfigError("tune.adapter.name=prefix: keys and values in front are no weights; they cannot be merged")

    def map_parts(self, function: Callable[[Weight, Any], Any], weight: Weight) -> "Prefixed":
        return Prefixed(function(weight, self.base), function(prefix(weight, self.places), self.prefix_PKH))

    def multiply(self, x: jax.Array, dot: Callable[..., jax.Array], *, rows_out: bool = False) -> jax.Array:
        return dot(x, self.base)

    def lookup(self, rows: Callable[[Any], jax.Array]) -> jax.Array:
        raise AssertionError("only what makes keys and values has a prefix")


def fits(weight: Weight) -> bool:
    """Matrices that make keys and values."""
    return weight.kind == "matmul" and (weight.in_axes, weight.out_axes) == (("embed",), ("kv_heads", "head_dim"))


def prefix(weight: Weight, length: int) -> Weight:
    copies = f"{' '.join(weight.batch_axes)} | " if weight.batch_axes else ""
    first, heads = weight.sizes[: len(weight.batch_axes)], weight.sizes[-2:]
    axes = f"{copies}prefix -> kv_heads head_dim"
    return Weight(axes, kind="lookup", init=normal(0.02), sizes=(*first, length, *heads))


def check(targets: Sequence[str]) -> None:
    """Raise ConfigError unless these are keys and values of the same layers."""
    parts = [{path.rpartition("/")[0] for path in targets if path.endswith(name)} for name in ("/key", "/value")]
    if parts[0] != parts[1]:
        raise ConfigError("tune.adapter.targets: a prefix has keys and values; name both of a layer, or none")


def weights(weight: Weight, cfg: AdapterConfig) -> Spec:
    return {"prefix": prefix(weight, cfg.length)}


def attached(weight: Weight, cfg: AdapterConfig, base: Any, beside: Any, keys: jax.Array | None) -> Prefixed:
    return Prefixed(base, beside["prefix"])
