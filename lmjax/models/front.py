"""Places in front of every text, which all of its tokens see: trained embeddings in place of those of tokens (a soft
prompt), or trained keys and values of each layer (a prefix).

Both are parts of stored weights (finetune/prompt.py, finetune/prefix.py), of the table of tokens and of the matrices
that make keys and values, and say how many `places` they take: 0 to P - 1, so that a text starts at position P.

    soft prompt    a row reads P more tokens at its start, whose embeddings are the prompt's
    prefix         a layer has P more keys and values
    a cache        has both as its first columns, from the start

What is in front of a row is in front of each of its documents: they all see it, and it sees none of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.devices.gather import gather
from lmjax.devices.mesh import constrain, shards
from lmjax.errors import ConfigError
from lmjax.models.attention.scores import Mask
from lmjax.weights import Params


def places(params: Any) -> int:
    """How many places stand in front of every text."""
    leaves = jax.tree.leaves(params, is_leaf=lambda w: hasattr(w, "places"))
    return max((w.places for w in leaves if hasattr(w, "places")), default=0)


def after_front(positions_BT: jax.Array, P: int) -> jax.Array:
    """Positions of a text behind P places; those of padding stay negative."""
    return jnp.where(positions_BT < 0, positions_BT, positions_BT + P)


# A soft prompt ----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Rows of tokens, as `hidden` is given them or with a soft prompt in front."""

    tokens_BT: jax.Array
    positions_BT: jax.Array | None
    segments_BT: jax.Array | None
    front_1T: jax.Array | None = None
    """Which places every document of the row sees, where documents share rows."""
    text_BT: jax.Array | None = None
    """Which tokens are the text's, and no padding, where the first ones are those that a soft prompt starts from."""


def has_prompt(params: Params) -> bool:
    return hasattr(params["embed"], "prompt_PD")


def prompt_ids(params: Params) -> jax.Array:
    """The tokens [P] that a prompt starts from, spread evenly over the table."""
    table = params["embed"]
    (P, _), V = table.prompt_PD.shape, jax.tree.leaves(table.table)[0].shape[0]
    return jnp.arange(P, dtype=jnp.int32) * V // P


def behind_prompt(params: Params, row: Row) -> Row:
    """Rows with the prompt in front. Raises ConfigError where devices cannot share them."""
    ids_P, T = prompt_ids(params), row.tokens_BT.shape[1]
    P = len(ids_P)
    if shards("time") > 1 or (P + T) % shards("residual_time"):
        raise ConfigError(
            f"tune.adapter.length={P}: devices along mesh.context, or the {shards('residual_time')} along mesh.tensor, "
            f"cannot share a row of {P} + {T} places; choose another length or mesh.layout"
        )

    def put(front_1P: jax.Array, x_BT: jax.Array) -> jax.Array:
        front_BP = constrain(jnp.broadcast_to(front_1P[None], (len(x_BT), P)).astype(x_BT.dtype), "batch", None)
        return jnp.concatenate([front_BP, x_BT], axis=1)

    positions_BT, segments_BT, front_1T = row.positions_BT, row.segments_BT, None
    if positions_BT is not None:
        positions_BT = put(jnp.arange(P), after_front(positions_BT, P))
    if segments_BT is not None:
        segments_BT, front_1T = put(jnp.full(P, -1), segments_BT), jnp.arange(P + T)[None] < P
    is_real_BT = (row.tokens_BT if row.positions_BT is None else row.positions_BT) >= 0  # no token is negative
    return Row(put(ids_P, row.tokens_BT), positions_BT, segments_BT, front_1T, put(jnp.zeros(P, bool), is_real_BT))


def prompt_alone(params: Params, batch: int) -> Row:
    """Rows of the prompt and nothing else."""
    ids_P = prompt_ids(params)
    ids_BP, positions_BP = (jnp.broadcast_to(x[None], (batch, len(ids_P))) for x in (ids_P, jnp.arange(len(ids_P))))
    return Row(ids_BP, positions_BP, None, text_BT=jnp.zeros(ids_BP.shape, bool))


def add_prompt(table: Any, x_BTD: jax.Array) -> jax.Array:
    """Embeddings of rows with the prompt's tokens in front -> those with the prompt itself."""
    prompt_PD = gather(table.prompt_PD)
    padded_TD = jnp.pad(prompt_PD, ((0, x_BTD.shape[1] - len(prompt_PD)), (0, 0)))
    return x_BTD + constrain(padded_TD[None], None, "residual_time", None).astype(x_BTD.dtype)


def table_alone(stored: Any) -> Any:
    """The stored table of tokens without the prompt that may come with it."""
    return getattr(stored, "table", stored)


# A prefix ---------------------------------------------------------------------------------------------------------


def prefix_of(p: Params) -> tuple[jax.Array, jax.Array] | None:
    """(keys, values) [P, K, H] in front of what one layer of attention sees; None without."""
    return (p["key"].prefix_PKH, p["value"].prefix_PKH) if hasattr(p["key"], "prefix_PKH") else None


def with_prefix(
    prefix: tuple[jax.Array, jax.Array], k_BTKH: jax.Array, v_BTKH: jax.Array, mask: Mask
) -> tuple[jax.Array, jax.Array, Mask]:
    """Keys and values with the prefix in front, and who sees them. `mask` has positions, from P on.

    Raises ConfigError where devices share rows.
    """
    if shards("time") > 1:
        raise ConfigError("tune.adapter.name=prefix: devices along mesh.context do not share it; use another layout")
    assert mask.positions_BT is not None
    P, T = len(prefix[0]), k_BTKH.shape[1]

    def put(front: jax.Array, x: jax.Array, *names: str | None) -> jax.Array:
        front = jnp.broadcast_to(front[None], (len(x), *front.shape)).astype(x.dtype)
        return jnp.concatenate([constrain(front, *names), x], axis=1)

    heads = ("batch", None, "kv_heads", None)
    rows = ("batch" if len(mask.positions_BT) > 1 else None, None)
    seen = mask._replace(
        key_positions_BS=put(jnp.arange(P), mask.positions_BT, *rows),
        key_segments_BS=None if mask.segments_BT is None else put(jnp.full(P, -1), mask.segments_BT, "batch", None),
        front_1S=jnp.arange(P + T)[None] < P,
    )
    return put(prefix[0], k_BTKH, *heads), put(prefix[1], v_BTKH, *heads), seen
