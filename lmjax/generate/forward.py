"""A model one token at a time, with a cache or without one.

`prefill` reads the prompts, `step` adds one token to every row. Both return the logits of each row's next token and a
`Memory`, whose arrays have one leading row per text: beam search reorders them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.generate.spread import spread_rows
from lmjax.models.model import Model
from lmjax.weights import Params

Memory = Any


class Functions(NamedTuple):
    """What generation needs of a model. Hashable, so that `jax.jit` knows a program that it has compiled."""

    hidden: Callable[..., Any]
    unembed: Callable[..., jax.Array]
    empty_cache: Callable[[int, int], Any] | None
    vocab: int
    """Ids that the tokenizer has; a model's table may be padded beyond."""


def functions(model: Model, vocab: int) -> Functions:
    return Functions(model.hidden, model.unembed, model.empty_cache, vocab)


def prefill(
    model: Functions, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, room: int
) -> tuple[jax.Array, Memory]:
    """Read prompts, padded at their ends, and keep room for `room` more tokens -> (float32 logits_BV, memory).

    Without a cache the memory is the text itself.
    """
    tokens_BT, lengths_B = spread_rows((tokens_BT, lengths_B))
    B, T = tokens_BT.shape
    if model.empty_cache is None:
        texts_BT = jnp.pad(tokens_BT, ((0, 0), (0, room)))
        return _read_again(model, params, texts_BT, lengths_B - 1), texts_BT
    positions_BT = jnp.where(jnp.arange(T) < lengths_B[:, None], jnp.arange(T), -1)
    cache = model.empty_cache(B, T + room)
    x_BTD, cache, _ = model.hidden(params, tokens_BT, positions_BT=positions_BT, cache=cache)
    return _logits(model, params, x_BTD, lengths_B - 1), cache


def step(
    model: Functions, params: Params, memory: Memory, token_B: jax.Array, position_B: jax.Array
) -> tuple[jax.Array, Memory]:
    """Add one token to every row, at its position -> (float32 logits_BV of the next one, memory)."""
    token_B, position_B = spread_rows((token_B, position_B))
    if model.empty_cache is None:
        texts_BT = memory.at[jnp.arange(len(token_B)), position_B].set(token_B)
        return _read_again(model, params, texts_BT, position_B), texts_BT
    x_B1D, cache, _ = model.hidden(params, token_B[:, None], positions_BT=position_B[:, None], cache=memory)
    return model.unembed(params, x_B1D[:, 0])[:, : model.vocab], cache


def take_rows(memory: Memory, rows_B: jax.Array) -> Memory:
    """Texts `rows_B` of a memory, in that order; a text may be taken several times."""
    return jax.tree.map(lambda x: x if x.ndim == 0 else x[rows_B], memory)


def _read_again(model: Functions, params: Params, texts_BT: jax.Array, last_B: jax.Array) -> jax.Array:
    """The whole text in one causal pass: what comes after a row's end cannot change it."""
    return _logits(model, params, model.hidden(params, texts_BT)[0], last_B)


def _logits(model: Functions, params: Params, x_BTD: jax.Array, last_B: jax.Array) -> jax.Array:
    x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
    return model.unembed(params, x_BD)[:, : model.vocab]
