"""A model that reads some tokens at a time, with a cache or without one.

`prefill` reads whole prompts, `read` adds tokens to every row. Both return the logits of each row's next token and a
`Memory`, whose arrays have one leading row per text: beam search reorders them, and a new text takes a free one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.generate.spread import spread_rows
from lmjax.models.attention import cache as caches
from lmjax.models.attention.cache import LayerCache
from lmjax.models.model import Model
from lmjax.weights import Params

Memory = Any


class Functions(NamedTuple):
    """What generation needs of a model. Hashable, so that `jax.jit` knows a program that it has compiled."""

    hidden: Callable[..., Any]
    unembed: Callable[..., jax.Array]
    empty_cache: Callable[[Params, int, int], Any] | None
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
    cache = model.empty_cache(params, B, T + room)
    x_BTD, cache, _ = model.hidden(params, tokens_BT, positions_BT=positions_BT, cache=cache)
    return _logits(model, params, x_BTD, lengths_B - 1), cache


def empty_memory(model: Functions, params: Params, rows: int, length: int) -> Memory:
    """Of rows without a token yet, each with room for `length`."""
    if model.empty_cache is None:
        return jnp.zeros((rows, length), jnp.int32)
    cache = model.empty_cache(params, rows, length)
    return _by_layer(lambda x: caches.opened(x) if isinstance(x, LayerCache) else x, cache)


def read(
    model: Functions, params: Params, memory: Memory, tokens_BT: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, Memory]:
    """Add tokens to every row, at their positions -> (float32 logits_BV of what follows the last one, memory).

    A token at a negative position is padding: before a text begins, or in a row that has ended.
    """
    tokens_BT, positions_BT = spread_rows((tokens_BT, positions_BT))
    if model.empty_cache is None:
        outside = memory.shape[1]
        columns_BT = jnp.where(positions_BT < 0, outside, positions_BT)
        texts_BS = memory.at[jnp.arange(len(memory))[:, None], columns_BT].set(tokens_BT, mode="drop")
        return _read_again(model, params, texts_BS, positions_BT[:, -1]), texts_BS
    x_BTD, cache, _ = model.hidden(params, tokens_BT, positions_BT=positions_BT, cache=memory)
    return model.unembed(params, x_BTD[:, -1])[:, : model.vocab], cache


def step(
    model: Functions, params: Params, memory: Memory, token_B: jax.Array, position_B: jax.Array
) -> tuple[jax.Array, Memory]:
    """`read` of one token a row."""
    return read(model, params, memory, token_B[:, None], position_B[:, None])


def put_rows(memory: Memory, source_B: jax.Array, taken: Memory) -> Memory:
    """Text `source_B[b]` of another memory of the same length in place of text b, unless negative."""

    def put(old: Any, new: Any) -> Any:
        if isinstance(old, LayerCache):
            return caches.put_rows(old, source_B, new)
        return caches.replace_rows(old, source_B, new)

    return _by_layer(put, memory, taken)


def _by_layer(function: Callable[..., Any], *memories: Memory) -> Memory:
    return jax.tree.map(function, *memories, is_leaf=lambda x: isinstance(x, LayerCache))


def take_rows(memory: Memory, rows_B: jax.Array) -> Memory:
    """Texts `rows_B` of a memory, in that order; a text may be taken several times."""
    return jax.tree.map(lambda x: x if x.ndim == 0 else x[rows_B], memory)


def _read_again(model: Functions, params: Params, texts_BT: jax.Array, last_B: jax.Array) -> jax.Array:
    """The whole text in one causal pass: what comes after a row's end cannot change it."""
    return _logits(model, params, model.hidden(params, texts_BT)[0], last_B)


def _logits(model: Functions, params: Params, x_BTD: jax.Array, last_B: jax.Array) -> jax.Array:
    x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
    return model.unembed(params, x_BD)[:, : model.vocab]
