"""Keys and values of the tokens already seen by one layer.

A ring of columns: every forward pass fills the next ones, the same for all rows, so one new token is one contiguous
update in place. A sliding-window layer has `window` columns however long the text grows. Which token lies in a column
differs by row, so each row stores positions: rows of a batch may have different lengths.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LayerCache:
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array
    """The position of the token in each column; -1 is empty."""
    filled: jax.Array
    """How many columns were ever filled, int32; the next one is `filled % S`."""
    fresh: bool = flax.struct.field(pytree_node=False, default=False)
    """Nothing was written yet, known while tracing."""


def empty(batch: int, length: int, kv_heads: int, head_dim: int, dtype: str) -> LayerCache:
    shape = (batch, length, kv_heads, head_dim)
    return LayerCache(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.full((batch, length), -1, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
        fresh=True,
    )


def extend(
    cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
) -> tuple[LayerCache, LayerCache]:
    """Add tokens; returns (what the new tokens may attend to, the cache to keep).

    A single new token may overwrite the one that just left its window, so the written cache serves both ends. Several
    need what the last of them overwrites: they attend to the old cache, unless it is empty, and to themselves.

    Negative positions are padding. It takes up columns like any token, and in a full ring pushes out real ones: let a
    batch have it only in the first pass, or once a row is done.
    """
    new = LayerCache(k_BTKH, v_BTKH, positions_BT, filled=cache.filled)
    written = _write(cache, new)
    if positions_BT.shape[1] == 1:
        return written, written
    if cache.fresh:
        return new, written
    both = LayerCache(
        jnp.concatenate([cache.k_BSKH, k_BTKH], axis=1),
        jnp.concatenate([cache.v_BSKH, v_BTKH], axis=1),
        jnp.concatenate([cache.positions_BS, positions_BT], axis=1),
        filled=cache.filled,
    )
    return both, written


def _write(cache: LayerCache, new: LayerCache) -> LayerCache:
    """Fill the next columns with the last of the new tokens, as many as there is room for."""
    S, T = cache.positions_BS.shape[1], new.positions_BS.shape[1]
    if T > 1:
        new = _padding_first(new)

    def put(old_BS: jax.Array, new_BT: jax.Array) -> jax.Array:
        if T == 1:
            return jax.lax.dynamic_update_slice_in_dim(old_BS, new_BT, cache.filled % S, axis=1)
        columns = (cache.filled + jnp.arange(T)[-S:]) % S
        return old_BS.at[:, columns].set(new_BT[:, -S:])

    return LayerCache(
        put(cache.k_BSKH, new.k_BSKH),
        put(cache.v_BSKH, new.v_BSKH),
        put(cache.positions_BS, new.positions_BS),
        filled=cache.filled + T,
    )


def _padding_first(new: LayerCache) -> LayerCache:
    """Every row's tokens in order of position: what a small ring drops is then padding, or far away."""
    order_BT = jnp.argsort(new.positions_BS, axis=1)
    return dataclasses.replace(
        new,
        k_BSKH=jnp.take_along_axis(new.k_BSKH, order_BT[:, :, None, None], axis=1),
        v_BSKH=jnp.take_along_axis(new.v_BSKH, order_BT[:, :, None, None], axis=1),
        positions_BS=jnp.take_along_axis(new.positions_BS, order_BT, axis=1),
    )
