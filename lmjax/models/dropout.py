"""Dropout whose masks have names: (sample, layer, site) says which entries are zeroed, whichever devices hold them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmjax.devices.mesh import constrain, current_mesh
from lmjax.devices.rows import token_order

EMBED_SITE, MIXER_SITE, MLP_SITE, WEIGHTS_SITE = 0, 1, 2, 3  # where dropout acts: part of a mask's name
DROPOUTS = ("dropout", "attention_dropout", "embed_dropout")  # the settings of a model that are rates of dropout
Rate = float | jax.Array
_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)  # of threefry's rounds, by turns


def dropout(x_BTD: jax.Array, keys_B: jax.Array | None, rate: Rate, layer: int | jax.Array, site: int) -> jax.Array:
    """Zero a share `rate` of the entries, which may be traced, and scale up the rest; `keys_B` None means evaluation.

    A mask is named by (sample, layer, site) and by nothing else: accumulation, mesh and resume leave it identical.
    """
    if keys_B is None:
        return x_BTD
    keep, scale = _kept(rate)

    def one(key: jax.Array, x_TD: jax.Array) -> jax.Array:
        kept_TD = bernoulli(site_key(key, layer, site), keep, *x_TD.shape)
        return jnp.where(kept_TD, x_TD * scale.astype(x_TD.dtype), 0)

    return jax.vmap(one)(keys_B, x_BTD)


def drop_inputs(x: jax.Array, keys_B: jax.Array | None, rate: Rate) -> jax.Array:
    """`dropout` of what a matrix reads, x[B, T, *in], wherever its axes are sharded; the keys name the masks whole."""
    if keys_B is None:
        return x
    keep, scale = _kept(rate)
    place = _places(x.shape[1:], None if current_mesh() is None else jax.typeof(x).sharding.spec[1:])

    def one(key: jax.Array, x_T: jax.Array) -> jax.Array:
        return jnp.where(_uniform(_bits(key, 0, place)) < keep, x_T * scale.astype(x_T.dtype), 0)

    return jax.vmap(one)(keys_B, x)


def _places(shape: tuple[int, ...], spec: Any) -> jax.Array:
    """Where each entry of a row of tokens stands in the row's stream, uint32[T, *in], sharded by `spec`."""
    assert math.prod(shape) < 1 << 32, "the upper half of threefry's counter is taken to be 0"
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(shape):
        index = (token_order(size) if axis == 0 else jnp.arange(size)).astype(jnp.uint32)
        index = index if spec is None else jax.sharding.reshard(index, PartitionSpec(spec[axis]))
        place = place[..., None] * jnp.uint32(size) + index
    return place


def _kept(rate: Rate) -> tuple[jax.Array, jax.Array]:
    """(the share that is kept, what the rest is multiplied by)"""
    keep = jnp.asarray(1 - rate, jnp.float32)
    return keep, 1 / keep


def site_key(key: jax.Array, layer: int | jax.Array, site: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, layer), site)


def bernoulli(key: jax.Array, p: Rate, T: int, D: int) -> jax.Array:
    """`jax.random.bernoulli(key, p, (T, D))` of a row's tokens, sharded as the residual stream is.

    On a mesh every device draws the bits of its own tokens. Entry i of threefry's stream depends on i alone, so they
    are the bits of a single device, whatever order the tokens are in.
    """
    assert T * D < 1 << 32, "the upper half of threefry's counter is taken to be 0"
    tokens_T = constrain(token_order(T), "residual_time").astype(jnp.uint32)
    count_TD = tokens_T[:, None] * jnp.uint32(D) + jnp.arange(D, dtype=jnp.uint32)
    return _uniform(_bits(key, 0, count_TD)) < p


def _bits(key: jax.Array, high: Any, low: jax.Array) -> jax.Array:
    """uint32 of a stream of `jax.random` at the places high * 2^32 + low: the two words of Threefry-2x32 with 20 rounds
    (Salmon et al. 2011), one or the other.

    It is one expression, which XLA makes a single pass over memory. jax's own is a loop over whole arrays on a CPU.
    """
    first, second = jax.random.key_data(key)
    keys = (first, second, first ^ second ^ jnp.uint32(0x1BD11BDA))
    x, y = high + first, low + second
    for i, rotations in enumerate(_ROTATIONS[i % 2] for i in range(5)):
        for left in rotations:
            x = x + y
            y = x ^ (y << left | y >> 32 - left)
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x ^ y


def _uniform(bits: jax.Array) -> jax.Array:
    """uint32 -> float32 in [0, 1), as `jax.random.uniform` makes them."""
    return jax.lax.bitcast_convert_type(bits >> 9 | jnp.uint32(0x3F800000), jnp.float32) - 1


class PairDropout(NamedTuple):
    """Zero a share of what a query takes from its keys, and scale up the rest: of the weights, after the softmax."""

    rate: Rate
    keys_B: jax.Array
    """Named by sample, layer and site."""

    def apply(self, p_BNTS: jax.Array, query: int = 0, key: int = 0, row: int | None = None) -> jax.Array:
        """Drop some of the weights of a row over its keys.

        The bits of entry (t, s) of head n are those of the n-th stream at t S + s, wherever they are drawn. A block of
        a row's weights begins with the query and the key of these numbers; `row` is then S, the row's own.
        """
        N, T, S = p_BNTS.shape[1:]
        row = row or S
        assert (query + T) * row < 1 << 32, "a head has a stream of 2^32 entries"
        head_N = constrain(jnp.arange(N, dtype=jnp.uint32), "heads")
        query_T, key_S = (constrain(token_order(T), "time") + query).astype(jnp.uint32), token_order(S) + key
        keep, _ = _kept(self.rate)
        place_TS = query_T[:, None] * jnp.uint32(row) + key_S.astype(jnp.uint32)

        def one(key: jax.Array, p_NTS: jax.Array) -> jax.Array:
            bits_NTS = _bits(key, head_N[:, None, None], place_TS)
            return jnp.where(_uniform(bits_NTS) < keep, p_NTS / keep.astype(p_NTS.dtype), 0)

        return jax.vmap(one)(self.keys_B, p_BNTS)
