"""Matrices in fewer bits, for decoding, where a token takes as long as reading all weights once; texts are scored by
them to say what they cost.

Both factors of a product are in fewer bits, so that processors multiply them as they are, without making floats of the
weights first. Sums are kept in float32, those of 8 bits in integers, exact.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lmjax.devices.mesh import platform
from lmjax.errors import ConfigError
from lmjax.models import front
from lmjax.models.model import Model
from lmjax.models.read import as_array
from lmjax.weights import Params, Weight, map_weights

_MOST = 127
"""The largest entry of 8 bits, of either sign."""


@flax.struct.dataclass
class Int8Matrix:
    """A matrix by the largest entry of each output, which meets rows by the largest entry of each."""

    values_OI: jax.Array
    """int8 [*out, *in]: XLA's CPU backend multiplies fastest where outputs stand in front."""
    scale_O: jax.Array
    """float32 [*out]"""

    def map_parts(self, function: Callable[[Weight, Any], Any], weight: Weight) -> "Int8Matrix":
        """Itself: it is multiplied as it is."""
        return self

    def product(self, x: jax.Array, contract: int, dtype: Any) -> jax.Array:
        """x[*rows, *in] -> [*rows, *out] in `dtype`, as `linear` does."""
        x = x.astype(jnp.float32)
        step = _step(x, tuple(range(x.ndim - contract, x.ndim)))
        sums = _product(_rounded(x, step), self.values_OI, contract, jnp.int32).astype(jnp.float32)
        rows = x.shape[: x.ndim - contract]
        return (sums * step.reshape(*rows, *[1] * self.scale_O.ndim) * self.scale_O).astype(dtype)


@flax.struct.dataclass
class BFloat16Matrix:
    """A rounded matrix, which meets rounded rows."""

    values_OI: jax.Array
    """bfloat16 [*out, *in]"""

    def map_parts(self, function: Callable[[Weight, Any], Any], weight: Weight) -> "BFloat16Matrix":
        """Itself: it is multiplied as it is."""
        return self

    def product(self, x: jax.Array, contract: int, dtype: Any) -> jax.Array:
        """x[*rows, *in] -> [*rows, *out] in `dtype`, as `linear` does."""
        return _product(x.astype(jnp.bfloat16), self.values_OI, contract, jnp.float32).astype(dtype)


def _product(x: jax.Array, w_OI: jax.Array, contract: int, dtype: Any) -> jax.Array:
    """x[*rows, *in] by w[*out, *in] -> [*rows, *out]."""
    rows, outs, ins = x.shape[: x.ndim - contract], w_OI.shape[:-contract], w_OI.shape[-contract:]
    count, n_in = math.prod(rows), math.prod(ins)
    x_RI = x.reshape(count, n_in)
    if platform() == "cpu" and count == 1:  # which XLA's CPU backend would take two to seven times as long for
        x_RI = jnp.pad(x_RI, ((0, 1), (0, 0)))
    w_OI = w_OI.reshape(math.prod(outs), n_in)
    y_RO = jax.lax.dot_general(x_RI, w_OI, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return y_RO[:count].reshape(*rows, *outs)


def _step(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """What 1 stands for, by the largest entry along these axes; 1 where all are 0."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    return jnp.where(largest > 0, largest / _MOST, 1)


def _rounded(x: jax.Array, step: jax.Array) -> jax.Array:
    return jnp.round(x / step).astype(jnp.int8)


# From stored weights ----------------------------------------------------------------------------------------------


def _outputs_first(weight: Weight, w: jax.Array) -> jax.Array:
    """[*copies, *in, *out] -> [*copies, *out, *in]."""
    first, middle = len(weight.batch_axes), len(weight.batch_axes) + len(weight.in_axes)
    return w.transpose(*range(first), *range(middle, w.ndim), *range(first, middle))


def int8_matrix(weight: Weight, w: jax.Array) -> Int8Matrix:
    """Each entry is rounded by at most half of its output's largest entry over 127."""
    w_OI = _outputs_first(weight, w).astype(jnp.float32)
    ins = tuple(range(w.ndim - len(weight.in_axes), w.ndim))
    step = _step(w_OI, ins)
    return Int8Matrix(_rounded(w_OI, step), jnp.squeeze(step, ins))


def bfloat16_matrix(weight: Weight, w: jax.Array) -> BFloat16Matrix:
    return BFloat16Matrix(_outputs_first(weight, w).astype(jnp.bfloat16))


MATRICES: dict[str, Callable[[Weight, jax.Array], Any]] = {"bfloat16": bfloat16_matrix, "int8": int8_matrix}
"""By the names that `GenerateConfig.weights` and `load_trained` take."""


def small_weights(model: Model, params: Params, name: str) -> Params:
    """The weights with their matrices in fewer bits, the head's too. An adapter beside one is merged into it, or stays
    beside it where no array does the same.

    Experts, routers, tables and adapters stay as they are. Raises ConfigError for a model that multiplies by its
    weights otherwise than by `linear`.
    """
    if model.empty_cache is None:
        raise ConfigError(f"weights={name} is for lmjax's own decoder, not for a model without a cache; leave it out")

    def one(weight: Weight, stored: Any) -> Any:
        if weight.kind != "matmul" or weight.float32 or not {"experts", "rank"}.isdisjoint(weight.names):
            return stored
        try:
            w = as_array(weight, stored)
        except ConfigError:
            return stored.map_parts(one, weight)
        return MATRICES[name](weight, w)

    def all_of_them(params: Params) -> Params:
        small: Params = map_weights(one, model.spec, params)
        if "unembed" in small:
            return small
        table_VD = as_array(model.spec["embed"], front.table_alone(params["embed"]))
        head = dataclasses.replace(model.spec["embed"], axes="embed -> vocab", kind="matmul")
        return {**small, "unembed": MATRICES[name](head, table_VD.T)}

    return jax.jit(all_of_them)(params)
