"""Which keys a query sees, and how it compares with them: what every attention backend must agree on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.models.activations import softcap
from lmjax.models.dropout import PairDropout
from lmjax.models.product import einsum


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


def scores(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask, score: Score) -> jax.Array:
    """How each query compares with each key, float32 [B, K, G, T, S]; the lowest number where it may not see it."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKGTH = (q_BTNH * score.scale).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    # Heads in front first: left to a product over axes in the middle, XLA's CPU backend copies more and larger arrays.
    k_BKSH = k_BSKH.swapaxes(1, 2)
    if T == 1:  # Of one query by a matrix it would make a transposed copy of the keys, not of a matrix by one query.
        s_BKGTS = einsum("BKSH,BKGTH->BKSGT", k_BKSH, q_BKGTH).transpose(0, 1, 3, 4, 2)
    else:
        s_BKGTS = einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
    s_BKGTS = softcap(s_BKGTS, score.softcap)
    if score.slopes_N is not None:
        slopes_KG = score.slopes_N.reshape(K, N // K)
        s_BKGTS -= slopes_KG[:, :, None, None] * distance(mask, T, S)[:, None, None].astype(jnp.float32)
    return jnp.where(visible(mask, T, S)[:, None, None], s_BKGTS, jnp.finfo(jnp.float32).min)
