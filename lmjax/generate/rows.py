"""Rows that texts are written in, and the three programs that do so: read prompts, admit them to rows, write.

A text takes a row, and leaves it for another when it ends. Lengths of prompts, numbers of tokens, stop tokens and keys
are data: none of them compiles anything.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from lmjax.generate import forward
from lmjax.generate.config import GenerateConfig
from lmjax.generate.forward import Functions, Memory
from lmjax.generate.sampling import sample
from lmjax.generate.spread import replicate, spread_rows
from lmjax.models.attention.cache import replace_rows
from lmjax.weights import Params

MOST_STEPS = 64
"""Tokens that one call of `advance` may add to each row."""


@flax.struct.dataclass
class Rows:
    """Texts being written: the newest token of each is not in the memory yet."""

    memory: Memory
    token_B: jax.Array
    position_B: jax.Array
    """The position of the newest token."""
    count_B: jax.Array
    """New tokens so far."""
    done_B: jax.Array
    """Free for another text."""
    keys_B: jax.Array
    seen_BV: jax.Array | None
    """Tokens of each row's prompt and text, kept only for a repetition penalty."""


@functools.partial(jax.jit, static_argnums=(0, 2, 3), static_argnames="cfg")
def empty_rows(model: Functions, params: Params, rows: int, length: int, *, cfg: GenerateConfig) -> Rows:
    """Free rows, each with room for `length` tokens."""
    zero_B = jnp.zeros(rows, jnp.int32)
    seen_BV = jnp.zeros((rows, model.vocab), bool) if cfg.repetition_penalty != 1 else None
    keys_B = jnp.broadcast_to(jax.random.key(0), (rows,))
    memory = forward.empty_memory(model, params, rows, length)
    return Rows(memory, zero_B, zero_B, zero_B, jnp.ones(rows, bool), keys_B, seen_BV)


empty_memory = jax.jit(forward.empty_memory, static_argnums=(0, 2, 3))
read = jax.jit(forward.read, static_argnums=0, donate_argnums=2)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnums=0)
def admit(
    rows: Rows,
    source_B: jax.Array,
    memory: Memory,
    logits_GV: jax.Array,
    lengths_G: jax.Array,
    keys_G: jax.Array,
    seen_GV: jax.Array | None,
    stop_ids: jax.Array,
    tokens: jax.Array,
    *,
    cfg: GenerateConfig,
) -> Rows:
    """Texts that were read take rows, text `source_B[b]` row b unless negative, and get their first new tokens."""
    new_B = source_B >= 0
    rows = Rows(
        memory=forward.put_rows(rows.memory, source_B, memory),
        token_B=rows.token_B,
        position_B=replace_rows(rows.position_B, source_B, lengths_G - 1),
        count_B=jnp.where(new_B, 0, rows.count_B),
        done_B=rows.done_B & ~new_B,
        keys_B=replace_rows(rows.keys_B, source_B, keys_G),
        seen_BV=None if rows.seen_BV is None or seen_GV is None else replace_rows(rows.seen_BV, source_B, seen_GV),
    )
    return _choose(rows, logits_GV[source_B], new_B, stop_ids, tokens, cfg)


@functools.partial(jax.jit, static_argnums=0, static_argnames="cfg", donate_argnums=2)
def advance(
    model: Functions,
    params: Params,
    rows: Rows,
    stop_ids: jax.Array,
    tokens: jax.Array,
    steps: jax.Array,
    others_wait: jax.Array,
    *,
    cfg: GenerateConfig,
) -> tuple[Rows, tuple[jax.Array, jax.Array, jax.Array]]:
    """Up to `steps` more tokens for every row; fewer when all have ended, or where others wait, when any has.

    Returns the rows, and for the host ids_BZ (each row's newest token before, then what was added), counts and which
    rows are done.
    """

    def goes_on(carry: tuple[Rows, jax.Array, jax.Array]) -> jax.Array:
        rows, _, i = carry
        return (i < steps) & ~jnp.all(rows.done_B) & ~(others_wait & jnp.any(rows.done_B))

    def body(carry: tuple[Rows, jax.Array, jax.Array]) -> tuple[Rows, jax.Array, jax.Array]:
        rows, ids_BZ, i = carry
        position_B = jnp.where(rows.done_B, -1, rows.position_B)
        logits_BV, memory = forward.step(model, params, rows.memory, rows.token_B, position_B)
        rows = _choose(rows.replace(memory=memory), logits_BV, ~rows.done_B, stop_ids, tokens, cfg)  # type: ignore[attr-defined]
        return rows, jax.lax.dynamic_update_slice(ids_BZ, rows.token_B[:, None], (0, i + 1)), i + 1

    ids_BZ = jnp.pad(rows.token_B[:, None], ((0, 0), (0, MOST_STEPS)))
    rows, ids_BZ, _ = jax.lax.while_loop(goes_on, body, (rows, ids_BZ, jnp.zeros((), jnp.int32)))
    return rows, replicate((ids_BZ, rows.count_B, rows.done_B))


@functools.partial(jax.jit, donate_argnums=0)
def end(rows: Rows, row: jax.Array) -> Rows:
    """One row writes no more."""
    return rows.replace(done_B=rows.done_B.at[row].set(True))  # type: ignore[attr-defined]


def _choose(
    rows: Rows, logits_BV: jax.Array, writes_B: jax.Array, stop_ids: jax.Array, tokens: jax.Array, cfg: GenerateConfig
) -> Rows:
    """The token that follows each row's newest one, where the row writes."""
    logits_BV = spread_rows(logits_BV)
    keys_B = jax.vmap(jax.random.fold_in)(rows.keys_B, rows.count_B)
    chosen_B = sample(logits_BV, keys_B, cfg, rows.seen_BV)
    token_B, count_B = jnp.where(writes_B, chosen_B, rows.token_B), rows.count_B + writes_B
    seen_BV = rows.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    return Rows(
        memory=rows.memory,
        token_B=token_B,
        position_B=rows.position_B + writes_B,
        count_B=count_B,
        done_B=rows.done_B | writes_B & (jnp.isin(token_B, stop_ids) | (count_B >= tokens)),
        keys_B=rows.keys_B,
        seen_BV=seen_BV,
    )
