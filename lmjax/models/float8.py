"""Matrix products in 8 bits: `model.matmul=float8`.

Both factors are scaled by one number each, the power of two that brings their largest entry just below the largest of
their type, and rounded: activations and weights to e4m3 (3 bits of mantissa), what flows back to e5m2 (2 bits, for its
wider range), as in Micikevicius et al. 2022 (arXiv:2209.05433). The scales are those of the arrays at hand ("current
scaling"): there is no history to save, and a resumed run has the same bits.

XLA makes one cuBLASLt product in 8 bits of `dot(convert(x8) * scale, convert(w8) * scale)`, which is the form here.
Other platforms compute just that: since scales are powers of two, they multiply the same numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.devices.gather import constant
from lmjax.devices.mesh import compute_capability, platform, specs_of
from lmjax.errors import ConfigError
from lmjax.models.config import ModelConfig
from lmjax.weights import Params, Spec, Weight, map_weights

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
_EXPONENT, _ONE = 0x7F800000, 0x00800000  # the bits of a float32's exponent, and the last of them


class Scaled(NamedTuple):
    """An array of 8-bit numbers times a scale."""

    bits: jax.Array
    """Of each number, as an integer: what a backward pass finds saved jax rounds by its type (`reduce_precision`, where
    there is remat), and takes the largest e4m3 numbers, whose type has no infinity, for infinite."""
    scale: jax.Array
    """A power of two, float32."""

    def numbers(self, number: Any) -> jax.Array:
        return jax.lax.bitcast_convert_type(self.bits, number)

    def wide(self, number: Any, dtype: Any) -> jax.Array:
        """In `dtype`, of numbers of the 8-bit type `number`."""
        return self.numbers(number).astype(dtype) * self.scale.astype(dtype)


def scaled(x: jax.Array, number: Any) -> Scaled:
    """x rounded to an 8-bit type. Where one entry is not finite, none stays so."""
    ratio = jnp.max(jnp.abs(x)).astype(jnp.float32) / float(jnp.finfo(number).max)
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
    scale = jax.lax.bitcast_convert_type((bits & _EXPONENT) + _ONE, jnp.float32)  # the next power of two
    return Scaled(jax.lax.bitcast_convert_type((x / scale.astype(x.dtype)).astype(number), jnp.uint8), scale)


def product(dot: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, w: jax.Array) -> jax.Array:
    """`dot(x, w)` of both rounded to 8 bits, and its gradients as products of 8 bits; results have the type of x."""
    specs = specs_of((x, w))  # a weight's also says how its gradient is added up over devices

    def wide(factors: tuple[Scaled, Scaled], dtype: Any) -> tuple[jax.Array, ...]:
        arrays = tuple(factor.wide(FORWARD, dtype) for factor in factors)
        return arrays if specs is None else tuple(map(jax.sharding.reshard, arrays, specs))

    @jax.custom_vjp
    def rounded(x: jax.Array, w: jax.Array) -> jax.Array:
        return forward(x, w)[0]

    def forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[Scaled, Scaled]]:
        factors = scaled(constant(x), FORWARD), scaled(constant(w), FORWARD)
        return dot(*wide(factors, x.dtype)), factors

    def backward(factors: tuple[Scaled, Scaled], dy: jax.Array) -> Any:
        _, gradients = jax.vjp(dot, *wide(factors, dy.dtype))
        return gradients(scaled(dy, BACKWARD).wide(BACKWARD, dy.dtype))

    rounded.defvjp(forward, backward)
    return rounded(x, w)


class Float8(NamedTuple):
    """A matrix that multiplies so: what `linear` takes for a compound."""

    w: jax.Array

    def multiply(self, x: jax.Array, dot: Callable[..., jax.Array], *, rows_out: bool = False) -> jax.Array:
        return product(dot, x, self.w)


def in_float8(spec: Spec, layers: Params) -> Params:
    """Weights of layers as `read` gives them -> the same with matrices that multiply in 8 bits, but those of mixtures
    of experts. Raises ConfigError for adapters."""

    def wrapped(weight: Weight, w: Any) -> Any:
        if hasattr(w, "multiply"):
            raise ConfigError(
                "model.matmul=float8 does not multiply by adapters; leave model.matmul or tune.adapter out"
            )
        return Float8(w) if weight.kind == "matmul" else w

    return {
        place: {part: w if part == "moe" else map_weights(wrapped, spec[place][part], w) for part, w in parts.items()}
        for place, parts in layers.items()
    }


def check(cfg: ModelConfig) -> None:
    """Raise ConfigError for a GPU that has no units for what the model multiplies in."""
    if cfg.matmul == "float8" and platform() == "gpu" and compute_capability() < (8, 9):
        raise ConfigError(
            "model.matmul=float8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper); leave it out"
        )
