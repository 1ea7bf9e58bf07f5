"""Keys and values of the tokens already seen by one layer.

A ring buffer: the token at position p lives in place p % S, so that a sliding-window layer keeps `window` places
however long the text grows. Positions are stored per row, so rows of a batch may have different lengths.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LayerCache:
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array
    """The position of the token in each place; -1 is empty."""


def empty(batch: int, length: int, kv_heads: int, head_dim: int, dtype: str) -> LayerCache:
    shape = (batch, length, kv_heads, head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full((batch, length), -1, jnp.int32))


def write(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array) -> LayerCache:
    """Add tokens; those at negative positions (padding) and those that later ones would overwrite are dropped."""
    S = cache.positions_BS.shape[1]
    last_B = jnp.max(positions_BT, axis=1, keepdims=True)
    kept = (positions_BT >= 0) & (positions_BT > last_B - S)
    places_BT = jnp.where(kept, positions_BT % S, S)  # S lies outside: mode="drop"
    rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
    return LayerCache(
        cache.k_BSKH.at[rows_B1, places_BT].set(k_BTKH, mode="drop"),
        cache.v_BSKH.at[rows_B1, places_BT].set(v_BTKH, mode="drop"),
        cache.positions_BS.at[rows_B1, places_BT].set(positions_BT, mode="drop"),
    )


def extend(
    cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
) -> tuple[LayerCache, LayerCache]:
    """Add tokens; returns (what the new tokens may attend to, the cache to keep).

    A single new token may overwrite the one that just left its window, so the written cache serves both ends. Several
    need what the last of them overwrites: they attend to the old cache and to themselves.
    """
    written = write(cache, k_BTKH, v_BTKH, positions_BT)
    if positions_BT.shape[1] == 1:
        return written, written
    both = LayerCache(
        jnp.concatenate([cache.k_BSKH, k_BTKH], axis=1),
        jnp.concatenate([cache.v_BSKH, v_BTKH], axis=1),
        jnp.concatenate([cache.positions_BS, positions_BT], axis=1),
    )
    return both, written
