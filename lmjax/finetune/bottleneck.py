"""Bottleneck adapters: a small network behind what each part of a layer writes (Houlsby et al. 2019, arXiv:1902.00751).

    y = x W,    y + gelu(y A) B,    A[embed, rank], B[rank, embed]

W is a matrix that writes to the residual stream. With B zero, training starts from what the frozen model computes. It
is no matrix, so nothing can be merged. The bias that a model may have behind W is added after it.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax

from lmjax.errors import ConfigError
from lmjax.models.linear import linear
from lmjax.train.config import AdapterConfig
from lmjax.weights import Spec, Weight, zeros


@flax.struct.dataclass
class Bottleneck:
    """A stored matrix with a network behind it: a `Compound` (models/read.py)."""

    base: Any
    down: jax.Array
    up: jax.Array

    def as_array(self, weight: Weight) -> jax.Array:
        raise ConfigError("tune.adapter.name=bottleneck: a network behind a matrix is no matrix; it cannot be merged")

    def map_parts(self, function: Callable[[Weight, Any], Any], weight: Weight) -> "Bottleneck":
        behind = network(weight, self.down.shape[-1])
        return self.replace(  # type: ignore[attr-defined]
            base=function(weight, self.base),
            down=function(behind["down"], self.down),
            up=function(behind["up"], self.up),
        )

    def multiply(self, x: jax.Array, dot: Callable[..., jax.Array], *, rows_out: bool = False) -> jax.Array:
        assert not rows_out, "only matrices have a network behind them"
        y = dot(x, self.base)
        return y + linear(jax.nn.gelu(linear(y, self.down)), self.up)

    def lookup(self, rows: Callable[[Any], jax.Array]) -> jax.Array:
        raise AssertionError("only matrices have a network behind them")


def fits(weight: Weight) -> bool:
    """Matrices that write to the residual stream, but those of experts, whose rows are mixed."""
    return weight.kind == "matmul" and weight.out_axes == ("embed",) and "experts" not in weight.batch_axes


def network(weight: Weight, rank: int) -> Spec:
    first, embed = weight.sizes[: len(weight.batch_axes)], weight.sizes[-1]
    copies = f"{' '.join(weight.batch_axes)} | " if first else ""
    return {
        "down": Weight(f"{copies}embed -> rank", sizes=(*first, embed, rank)),
        "up": Weight(f"{copies}rank -> embed", init=zeros, sizes=(*first, rank, embed)),
    }


def weights(weight: Weight, cfg: AdapterConfig) -> Spec:
    return network(weight, cfg.rank)


def attached(weight: Weight, cfg: AdapterConfig, base: Any, beside: Any, keys: jax.Array | None) -> Bottleneck:
    return Bottleneck(base, beside["down"], beside["up"])
