"""LoRA: a matrix of low rank beside a frozen one (Hu et al. 2021, arXiv:2106.09685).

    y = x W + scale (x A) B,    A[in, rank], B[rank, out],    scale = alpha / rank

W is never added to: for the gradient of W + AB, the whole gradient of W would have to be made. With A drawn and B zero,
training starts from what the frozen model computes, to the bit.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lmjax.models.dropout import drop_inputs
from lmjax.models.linear import linear
from lmjax.models.read import as_array
from lmjax.train.config import AdapterConfig
from lmjax.weights import Spec, Weight, normal, zeros


@flax.struct.dataclass
class LowRank:
    """A stored weight with its two factors: a `Compound` (models/read.py)."""

    base: Any
    down: jax.Array
    up: jax.Array
    keys_B: jax.Array | None
    """Of dropout, for each copy of the weight in front; None where nothing is dropped."""
    scale: float = flax.struct.field(pytree_node=False)
    dropout: float = flax.struct.field(pytree_node=False)

    def as_array(self, weight: Weight) -> jax.Array:
        """W + scale A B, in float32."""
        beside = product
        for _ in weight.batch_axes:
            beside = jax.vmap(beside)
        return as_array(weight, self.base).astype(jnp.float32) + self.scale * beside(self.down, self.up)

    def map_parts(self, function: Callable[[Weight, Any], Any], weight: Weight) -> "LowRank":
        beside = factors(weight, self.down.shape[-1])
        return self.replace(  # type: ignore[attr-defined]
            base=function(weight, self.base),
            down=function(beside["down"], self.down),
            up=function(beside["up"], self.up),
        )

    def multiply(self, x: jax.Array, dot: Callable[..., jax.Array], *, rows_out: bool = False) -> jax.Array:
        first, second = (self.up, self.down) if rows_out else (self.down, self.up)
        beside = dot(dot(drop_inputs(x, self.keys_B, self.dropout), first, dtype=x.dtype), second, contract=1)
        return dot(x, self.base) + self.scale * beside

    def lookup(self, rows: Callable[[Any], jax.Array]) -> jax.Array:
        return rows(self.base) + self.scale * linear(rows(self.down), self.up)


def product(down: jax.Array, up: jax.Array) -> jax.Array:
    """A B, its terms added up one after another: shards of it have the bits of the whole, which a matrix product, made
    otherwise for every shape, does not promise."""
    columns, spread = jnp.moveaxis(down, -1, 0), (..., *[None] * (up.ndim - 1))

    def add(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        column, row = pair
        return total + column[spread] * row, None

    return jax.lax.scan(add, columns[0][spread] * up[0], (columns[1:], up[1:]))[0]


def fits(weight: Weight) -> bool:
    """Matrices, and tables of tokens."""
    return weight.kind == "matmul" or (weight.kind == "lookup" and "vocab" in weight.in_axes)


def weights(weight: Weight, cfg: AdapterConfig) -> Spec:
    return factors(weight, cfg.rank)


def factors(weight: Weight, rank: int) -> Spec:
    """The two factors of a weight: copies of it, layers or experts, have their own.

    As in PEFT a matrix starts with A drawn and B zero, a table of tokens with A zero and B drawn.
    """
    copies, inputs = " ".join(weight.batch_axes), len(weight.batch_axes) + len(weight.in_axes)
    prefix, first = (f"{copies} | " if copies else ""), weight.sizes[: len(weight.batch_axes)]
    into, out = weight.sizes[len(first) : inputs], weight.sizes[inputs:]
    down = f"{prefix}{' '.join(weight.in_axes)} -> rank"
    up = f"{prefix}rank -> {' '.join(weight.out_axes)}"
    table = weight.kind == "lookup"
    return {
        "down": Weight(
            down,
            kind=weight.kind,
            init=zeros if table else uniform,
            tied=weight.tied,
            active=weight.active,
            float32=weight.float32,
            sizes=(*first, *into, rank),
        ),
        "up": Weight(
            up,
            init=normal(1.0) if table else zeros,
            active=weight.active,
            float32=weight.float32,
            sizes=(*first, rank, *out),
        ),
    }


def uniform(key: jax.Array, weight: Weight) -> jax.Array:
    """Uniform within fan_in ** -0.5: torch's default for a linear layer, with which PEFT starts A."""
    bound = weight.fan_in**-0.5
    return jax.random.uniform(key, weight.shape, minval=-bound, maxval=bound)


def attached(weight: Weight, cfg: AdapterConfig, base: Any, beside: Any, keys: jax.Array | None) -> LowRank:
    """The weight as the model reads it. rsLoRA divides by sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
    scale = cfg.alpha / (cfg.rank**0.5 if cfg.rank_stabilized else cfg.rank)
    return LowRank(base, beside["down"], beside["up"], keys, scale, cfg.dropout)
