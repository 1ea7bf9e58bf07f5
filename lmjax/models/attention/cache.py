"""Keys and values of the tokens already seen by one layer.

A ring of columns: every forward pass fills the next ones, the same for all rows, so one new token is one contiguous
update in place. A sliding-window layer has `window` columns however long the text grows. Which token lies in a column
differs by row, so each row stores positions: rows of a batch may have different lengths.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class LayerCache:
    """Heads stand before columns: attention reads each head's keys as one matrix, without a transposed copy."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    positions_BS: jax.Array
    """The position of the token in each column; -1 is empty."""
    filled: jax.Array
    """How many columns were ever filled, int32; the next one is `filled % S`."""
    fresh: bool = flax.struct.field(pytree_node=False, default=False)
    """Whether nothing was written yet, which is known while tracing."""
    has_front: bool = flax.struct.field(pytree_node=False, default=False)
    """Whether it began with what stands in front of every text (models/front.py), and padding comes after that."""


def empty(batch: int, length: int, kv_heads: int, head_dim: int, dtype: str) -> LayerCache:
    shape = (batch, kv_heads, length, head_dim)
    return LayerCache(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.full((batch, length), -1, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
        fresh=True,
    )


def opened(cache: LayerCache) -> LayerCache:
    """The cache as one that may have been written to: programs that add to it are then the same, empty or not."""
    return cache.replace(fresh=False)  # type: ignore[attr-defined]


def behind_front(cache: LayerCache) -> LayerCache:
    """The cache as one that holds what stands in front of every text."""
    return cache.replace(has_front=True)  # type: ignore[attr-defined]


def replace_rows(old: jax.Array, source_B: jax.Array, new: jax.Array) -> jax.Array:
    """Row `source_B[b]` of `new` [G, ...] in place of row b of `old` [B, ...], unless negative."""
    is_new = (source_B >= 0).reshape(-1, *[1] * (old.ndim - 1))
    return jnp.where(is_new, new[source_B], old)


def put_rows(cache: LayerCache, source_B: jax.Array, taken: LayerCache) -> LayerCache:
    """Row `source_B[b]` of another cache in place of row b, unless negative. Its tokens go to the columns before the
    next one, as if they had just been written, and each row's next token to the same column."""
    shift = (cache.filled - taken.filled) % cache.positions_BS.shape[1]

    def put(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        return replace_rows(old, source_B, jnp.roll(new, shift, axis))

    return LayerCache(
        put(cache.k_BKSH, taken.k_BKSH, 2),
        put(cache.v_BKSH, taken.v_BKSH, 2),
        put(cache.positions_BS, taken.positions_BS, 1),
        filled=cache.filled,
        has_front=cache.has_front,
    )


def extend(
    cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
) -> tuple[LayerCache, LayerCache]:
    """Add tokens; returns (what the new tokens may attend to, the cache to keep).

    A single new token may overwrite the one that just left its window, so the written cache serves both ends. Several
    need what the last of them overwrites: they attend to the old cache, unless it is empty, and to themselves.

    Negative positions are padding. It takes up columns like any token, and in a full ring pushes out real ones: let a
    batch have it only in the first pass, or once a row is done. What is in front of every text is read before the first
    pass, and is kept.
    """
    new = LayerCache(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), positions_BT, filled=cache.filled)
    if positions_BT.shape[1] == 1:
        written = _write_one(cache, new)
        return written, written
    if cache.fresh:
        return new, _write_many(cache, _padding_first(new))
    both = LayerCache(
        jnp.concatenate([cache.k_BKSH, new.k_BKSH], axis=2),
        jnp.concatenate([cache.v_BKSH, new.v_BKSH], axis=2),
        jnp.concatenate([cache.positions_BS, positions_BT], axis=1),
        filled=cache.filled,
    )
    return both, _keep_newest(cache, both) if cache.has_front else _write_many(cache, _padding_first(new))


def _write_one(cache: LayerCache, new: LayerCache) -> LayerCache:
    """Fill the next column in place."""
    S = cache.positions_BS.shape[1]

    def put(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        def update(old: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, cache.filled % S, axis=axis)

        if jax.default_backend() != "cpu":
            return update(old)
        # XLA's CPU backend would fuse the update into each of its readers and copy the whole cache for every one of
        # them: at 1,000 tokens that takes longer than the model. It does not look into a branch.
        return jax.lax.cond(cache.filled >= 0, update, lambda old: old, old)

    return LayerCache(
        put(cache.k_BKSH, new.k_BKSH, 2),
        put(cache.v_BKSH, new.v_BKSH, 2),
        put(cache.positions_BS, new.positions_BS, 1),
        filled=cache.filled + 1,
        has_front=cache.has_front,
    )


def _write_many(cache: LayerCache, new: LayerCache) -> LayerCache:
    """Fill the next columns with the last of the new tokens, as many as there is room for."""
    S, T = cache.positions_BS.shape[1], new.positions_BS.shape[1]
    columns = (cache.filled + jnp.arange(T)[-S:]) % S
    return LayerCache(
        cache.k_BKSH.at[:, :, columns].set(new.k_BKSH[:, :, -S:]),
        cache.v_BKSH.at[:, :, columns].set(new.v_BKSH[:, :, -S:]),
        cache.positions_BS.at[:, columns].set(new.positions_BS[:, -S:]),
        filled=cache.filled + T,
    )


def _keep_newest(cache: LayerCache, both: LayerCache) -> LayerCache:
    """Each row's tokens of the highest positions, as many as there is room for: padding gives way to them, and the next
    column is that of the oldest."""
    S, filled = cache.positions_BS.shape[1], cache.filled + both.positions_BS.shape[1] - cache.positions_BS.shape[1]
    newest = jax.tree.map(lambda x: x[..., -S:, :] if x.ndim == 4 else x, _padding_first(both))
    shift = filled % S
    return LayerCache(
        jnp.roll(newest.k_BKSH, shift, axis=2),
        jnp.roll(newest.v_BKSH, shift, axis=2),
        jnp.roll(newest.positions_BS[:, -S:], shift, axis=1),
        filled=filled,
        has_front=True,
    )


def _padding_first(new: LayerCache) -> LayerCache:
    """Every row's tokens in order of position: what a small ring drops is then padding, or far away."""
    order_BT = jnp.argsort(new.positions_BS, axis=1)
    order_B1T1 = order_BT[:, None, :, None]
    return LayerCache(
        jnp.take_along_axis(new.k_BKSH, order_B1T1, axis=2),
        jnp.take_along_axis(new.v_BKSH, order_B1T1, axis=2),
        jnp.take_along_axis(new.positions_BS, order_BT, axis=1),
        filled=new.filled,
    )
