"""Which keys a query sees, and how it compares with them: what every attention backend must agree on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.devices.mesh import current_mesh
from lmjax.models.activations import softcap
from lmjax.models.dropout import PairDropout
from lmjax.models.product import einsum

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


def compared(q_BNTH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """q . k, float32 [B, N, T, S]."""
    if q_BNTH.shape[2] == 1:  # of one query by a matrix XLA would make a transposed copy of the keys, not of the query
        s_BKSGT = einsum("BKSH,BKGTH->BKSGT", k_BKSH, _grouped(q_BNTH, k_BKSH))
        return s_BKSGT.transpose(0, 1, 3, 4, 2).reshape(*q_BNTH.shape[:3], -1)
    return _by_keys("BKGTH,BKSH->BKGTS", "BKGTS,BKSH->BKGTH", q_BNTH, k_BKSH)


def weighed(p_BNTS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """The sum of p v over the keys, float32 [B, N, T, H]."""
    return _by_keys("BKGTS,BKSH->BKGTH", "BKGTH,BKSH->BKGTS", p_BNTS, v_BKSH)


def _by_keys(letters: str, back: str, x_BNTX: jax.Array, y_BKSH: jax.Array) -> jax.Array:
    """A product of what each head has with what G of them share, float32; `back` is that of the gradient of x."""
    if current_mesh() is not None:
        return einsum(letters, _grouped(x_BNTX, y_BKSH), y_BKSH).reshape(*x_BNTX.shape[:3], -1)

    @jax.custom_vjp
    def multiplied(x_BNTX: jax.Array, y_BKSH: jax.Array) -> jax.Array:
        return _flat(letters, x_BNTX, y_BKSH, jnp.float32)

    def backward(factors: tuple[jax.Array, jax.Array], dz_BNTZ: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_BNTX, y_BKSH = factors
        dz_BNTZ = dz_BNTZ.astype(x_BNTX.dtype)  # see product.py
        wide, narrow = (x_BNTX, dz_BNTZ) if letters.startswith("BKGTS") else (dz_BNTZ, x_BNTX)
        return _flat(back, dz_BNTZ, y_BKSH, x_BNTX.dtype), _over_queries(narrow, wide, y_BKSH)

    multiplied.defvjp(lambda x_BNTX, y_BKSH: (multiplied(x_BNTX, y_BKSH), (x_BNTX, y_BKSH)), backward)
    return multiplied(x_BNTX, y_BKSH)


def _flat(letters: str, x_BNTX: jax.Array, y_BKSH: jax.Array, dtype: Any) -> jax.Array:
    if x_BNTX.shape[1] == y_BKSH.shape[1]:  # an axis of one in the middle costs a fifth of attention on a CPU
        return jnp.einsum(letters.replace("G", ""), x_BNTX, y_BKSH, preferred_element_type=dtype)
    z_BKGTZ = jnp.einsum(letters, _grouped(x_BNTX, y_BKSH), y_BKSH, preferred_element_type=dtype)
    return z_BKGTZ.reshape(*x_BNTX.shape[:3], -1)


def _over_queries(x_BNTH: jax.Array, y_BNTS: jax.Array, like_BKSH: jax.Array) -> jax.Array:
    """The gradient of keys or values, made as [B, K, H, S]: so the narrow factor is what is read transposed on a CPU,
    not the scores."""
    if x_BNTH.shape[1] == like_BKSH.shape[1]:
        product_BKHS = jnp.einsum("BKTH,BKTS->BKHS", x_BNTH, y_BNTS)
    else:
        product_BKHS = jnp.einsum("BKGTH,BKGTS->BKHS", _grouped(x_BNTH, like_BKSH), _grouped(y_BNTS, like_BKSH))
    # The barrier keeps the product in that form: without it XLA would merge the transposition into it.
    return jax.lax.optimization_barrier(product_BKHS).swapaxes(2, 3)


def _grouped(x_BNTX: jax.Array, y_BKSH: jax.Array) -> jax.Array:
    """[B, K, G, T, X]"""
    (B, N, T, X), K = x_BNTX.shape, y_BKSH.shape[1]
    return x_BNTX.reshape(B, K, N // K, T, X)
