"""Which keys a query sees, and how it compares with them: what every attention backend must agree on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.models.activations import softcap
from lmjax.models.dropout import PairDropout

HEADS, KV_HEADS = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
NO_DROPOUT = "cannot drop attention weights: model.attention_dropout"
BY_INDEX = "orders keys by index: it cannot decode from a cache, nor share rows over mesh.context"


class Mask(NamedTuple):
    """Which keys a query may see: none later than itself, none of another document, none beyond the window.

    Without positions, keys and queries are the same tokens and order is their index. With positions (decoding from a
    cache, rows of unequal length) order is the position, and a negative key position marks an empty place.
    """

    window: int | None = None
    segments_BT: jax.Array | None = None
    positions_BT: jax.Array | None = None
    key_positions_BS: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    """The positions of the keys, where they are not the same tokens as the queries."""
    front_1S: jax.Array | None = None
    """Keys that the queries of all documents see: models/front.py."""


class Score(NamedTuple):
    """How a query and a key are compared."""

    scale: float
    softcap: float | None = None
    slopes_N: np.ndarray | None = None
    """ALiBi: subtract slope * distance."""
    dropout: PairDropout | None = None


def distance(mask: Mask, T: int, S: int) -> jax.Array:
    """How far each key lies before its query, [1 or B, T, S]."""
    queries = jnp.arange(T)[None] if mask.positions_BT is None else mask.positions_BT
    keys = jnp.arange(S)[None] if mask.key_positions_BS is None else mask.key_positions_BS
    return queries[:, :, None] - keys[:, None, :]


def visible(mask: Mask, T: int, S: int) -> jax.Array:
    """The mask as booleans, [1 or B, T, S]."""
    away = distance(mask, T, S)
    seen = away >= 0
    if mask.window is not None:
        seen &= away < mask.window
    if mask.key_positions_BS is not None:
        seen &= mask.key_positions_BS[:, None, :] >= 0
    if mask.segments_BT is not None:
        key_segments_BS = mask.segments_BT if mask.key_segments_BS is None else mask.key_segments_BS
        same = mask.segments_BT[:, :, None] == key_segments_BS[:, None, :]
        seen &= same if mask.front_1S is None else same | mask.front_1S[:, None, :]
    return seen


def by_head(q_BTNH: jax.Array, k_BSKH: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Queries times `scale` [B, N, T, H], and keys [B, K, S, H].

    Transposed once, before they are cut into blocks: a product over axes in the middle copies more, and more often, on
    a CPU.
    """
    return (q_BTNH * scale).swapaxes(1, 2), k_BSKH.swapaxes(1, 2)


def scores(q_BNTH: jax.Array, k_BKSH: jax.Array, mask: Mask, score: Score) -> jax.Array:
    """How each query, which is scaled already, compares with each key, float32 [B, N, T, S]; the lowest number where it
    may not see it."""
    s_BNTS = softcap(compared(q_BNTH, k_BKSH), score.softcap)
    T, S = s_BNTS.shape[2:]
    if score.slopes_N is not None:
        s_BNTS -= score.slopes_N[:, None, None] * distance(mask, T, S)[:, None].astype(jnp.float32)
    return jnp.where(visible(mask, T, S)[:, None], s_BNTS, jnp.finfo(jnp.float32).min)


# Products with keys and values, each of which G = N / K heads share ---------------------------------------------------
#
# The gradients of keys and values, sums over queries, are made as [B, K, H, S]: so the narrow factor is what is read
# transposed, not the scores. What flows back is rounded to the type of the factors first (product.py).


@jax.custom_vjp
def compared(q_BNTH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """q . k, float32 [B, N, T, S]."""
    return _with_keys("BKGTH,BKSH->BKGTS", q_BNTH, k_BKSH, jnp.float32)


@jax.custom_vjp
def weighed(p_BNTS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """The sum of p v over the keys, float32 [B, N, T, H]."""
    return _with_keys("BKGTS,BKSH->BKGTH", p_BNTS, v_BKSH, jnp.float32)


def _compared_backward(factors: tuple[jax.Array, jax.Array], ds_BNTS: jax.Array) -> tuple[jax.Array, jax.Array]:
    q_BNTH, k_BKSH = factors
    ds_BNTS = ds_BNTS.astype(q_BNTH.dtype)
    dq_BNTH = _with_keys("BKGTS,BKSH->BKGTH", ds_BNTS, k_BKSH, q_BNTH.dtype)
    return dq_BNTH, _over_queries(q_BNTH, ds_BNTS, k_BKSH.shape[1])


def _weighed_backward(factors: tuple[jax.Array, jax.Array], dy_BNTH: jax.Array) -> tuple[jax.Array, jax.Array]:
    p_BNTS, v_BKSH = factors
    dy_BNTH = dy_BNTH.astype(p_BNTS.dtype)
    dp_BNTS = _with_keys("BKGTH,BKSH->BKGTS", dy_BNTH, v_BKSH, p_BNTS.dtype)
    return dp_BNTS, _over_queries(dy_BNTH, p_BNTS, v_BKSH.shape[1])


compared.defvjp(lambda q_BNTH, k_BKSH: (compared(q_BNTH, k_BKSH), (q_BNTH, k_BKSH)), _compared_backward)
weighed.defvjp(lambda p_BNTS, v_BKSH: (weighed(p_BNTS, v_BKSH), (p_BNTS, v_BKSH)), _weighed_backward)


def _with_keys(letters: str, x_BNTX: jax.Array, y_BKSH: jax.Array, dtype: Any) -> jax.Array:
    (B, N, T, X), K = x_BNTX.shape, y_BKSH.shape[1]
    if N == K:  # an axis of one in the middle costs a fifth of attention on a CPU
        return jnp.einsum(letters.replace("G", ""), x_BNTX, y_BKSH, preferred_element_type=dtype)
    out = jnp.einsum(letters, x_BNTX.reshape(B, K, N // K, T, X), y_BKSH, preferred_element_type=dtype)
    return out.reshape(B, N, T, -1)


def _over_queries(x_BNTH: jax.Array, y_BNTS: jax.Array, K: int) -> jax.Array:
    B, N = x_BNTH.shape[:2]
    if N == K:
        product_BKHS = jnp.einsum("BKTH,BKTS->BKHS", x_BNTH, y_BNTS)
    else:
        x_BKGTH, y_BKGTS = (x.reshape(B, K, N // K, *x.shape[2:]) for x in (x_BNTH, y_BNTS))
        product_BKHS = jnp.einsum("BKGTH,BKGTS->BKHS", x_BKGTH, y_BKGTS)
    # The barrier keeps the product in that form: without it XLA would merge the transposition into it.
    return jax.lax.optimization_barrier(product_BKHS).swapaxes(2, 3)
