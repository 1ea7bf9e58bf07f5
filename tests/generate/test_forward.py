"""One token at a time gives what the whole text at once gives, for every family of decoders."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from lmjax.generate.forward import functions, prefill, step, take_rows
from lmjax.models import decoder, flax_model
from lmjax.models.config import ModelConfig
from lmjax.models.model import Model
from lmjax.weights import Params
from tests.random_params import random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = 1e-5  # largest absolute difference between two float32 ways to the same number of order one
V, T, STEPS = 61, 12, 9
LENGTHS_B = np.array([1, 11, 6], np.int32)  # short and long beside sliding windows of 3 and 5
SLIDING = ModelConfig(vocab=V, layers=3, pattern=("local", "global"), window=5, embed=24, heads=4, kv_heads=2, mlp=40)


def random_texts() -> np.ndarray:
    return np.random.default_rng(1).integers(V, size=(len(LENGTHS_B), T + STEPS)).astype(np.int32)


def stepwise_logits(model: Model, params: Params, texts_BT: np.ndarray) -> np.ndarray:
    """Logits after each prompt and after each of the tokens that follow it, [B, STEPS + 1, V]."""
    parts = functions(model, V)
    params = model.unstack(params)
    read = jax.jit(functools.partial(prefill, parts), static_argnums=3)
    add = jax.jit(functools.partial(step, parts))
    prompts_BT = np.where(np.arange(T) < LENGTHS_B[:, None], texts_BT[:, :T], 7)  # 7 is padding
    logits_BV, memory = read(params, prompts_BT, LENGTHS_B, STEPS)
    logits = [logits_BV]
    for position_B in LENGTHS_B + np.arange(STEPS)[:, None]:
        token_B = texts_BT[np.arange(len(LENGTHS_B)), position_B]
        logits_BV, memory = add(params, memory, token_B, position_B)
        logits.append(logits_BV)
    return np.stack(logits, axis=1)


def whole_logits(model: Model, params: Params, texts_BT: np.ndarray) -> np.ndarray:
    """The same from one pass over each whole text."""
    logits_BSV = np.asarray(jax.jit(model.logits)(params, texts_BT))
    columns = LENGTHS_B[:, None] - 1 + np.arange(STEPS + 1)
    return np.take_along_axis(logits_BSV, columns[:, :, None], axis=1)


def check_stepwise(model: Model, params: Params) -> None:
    texts_BT = random_texts()
    np.testing.assert_allclose(
        stepwise_logits(model, params, texts_BT), whole_logits(model, params, texts_BT), rtol=0, atol=TOLERANCE
    )


def test_stepwise_equals_the_whole(cfg: ModelConfig) -> None:
    model = decoder.build(cfg)
    check_stepwise(model, random_params(model.spec))


def test_several_tokens_after_a_prompt() -> None:
    """A second pass over several tokens sees the cache and itself, around the ring's end too."""
    model = decoder.build(SLIDING)
    assert model.empty_cache is not None
    params, tokens_BT = random_params(model.spec), random_texts()
    whole_BTD = jax.jit(model.hidden)(params, tokens_BT)[0]
    unstacked = model.unstack(params)
    cache = model.empty_cache(unstacked, *tokens_BT.shape)
    hidden, pieces = jax.jit(model.hidden), []
    for low, high in ((0, 7), (7, 11), (11, 12), (12, 21)):
        positions_BT = np.broadcast_to(np.arange(low, high), (len(tokens_BT), high - low))
        x_BTD, cache, _ = hidden(unstacked, tokens_BT[:, low:high], positions_BT=positions_BT, cache=cache)
        pieces.append(x_BTD)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole_BTD, rtol=0, atol=TOLERANCE)


def test_rows_of_a_memory_can_be_reordered() -> None:
    model = decoder.build(SLIDING)
    parts, params, texts_BT = functions(model, V), model.unstack(random_params(model.spec)), random_texts()
    rows = np.array([2, 0, 2, 1])
    read = jax.jit(functools.partial(prefill, parts, room=STEPS))
    add = jax.jit(functools.partial(step, parts))
    _, memory = read(params, texts_BT[:, :T], LENGTHS_B)
    _, expected = read(params, texts_BT[rows, :T], LENGTHS_B[rows])
    token_B = np.arange(4)
    taken, _ = add(params, take_rows(memory, rows), token_B, LENGTHS_B[rows])
    fresh, _ = add(params, expected, token_B, LENGTHS_B[rows])
    np.testing.assert_allclose(taken, fresh, rtol=0, atol=TOLERANCE)


class Linen(linen.Module):
    """A causal model without a cache: the mean of all embeddings so far."""

    @linen.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = linen.Embed(V, 16)(tokens_BT)
        counts_T1 = jnp.arange(1, x_BTD.shape[1] + 1)[:, None]
        return linen.Dense(V)(jnp.tanh(jnp.cumsum(x_BTD, axis=1) / counts_T1))


def test_a_model_without_a_cache_reads_its_text_again() -> None:
    check_stepwise(*flax_model.from_linen(Linen(), jnp.zeros((1, 4), jnp.int32), jax.random.key(0)))


def test_a_padded_vocabulary_is_never_chosen() -> None:
    model = decoder.build(SLIDING)
    parts, params = functions(model, V - 3), model.unstack(random_params(model.spec))
    read = functools.partial(prefill, parts, room=1)
    logits_BV, memory = jax.eval_shape(read, params, random_texts()[:, :T], LENGTHS_B)
    assert logits_BV.shape == (3, V - 3)
    assert jax.eval_shape(functools.partial(step, parts), params, memory, LENGTHS_B, LENGTHS_B)[0].shape == (3, V - 3)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_compiled_loop_copies_no_cache(batch: int) -> None:
    """One new token updates the cache in place: no copy as large as a layer's keys inside the loop."""
    model = decoder.build(SLIDING)
    parts, params = functions(model, V), model.unstack(random_params(model.spec))
    _, memory = jax.eval_shape(
        functools.partial(prefill, parts, room=500), params, np.zeros((batch, T), np.int32), np.full(batch, T)
    )

    def loop(memory: Any, position_B: jax.Array) -> Any:
        def body(_: int, carry: Any) -> Any:
            logits_BV, memory = step(parts, params, carry[0], jnp.argmax(carry[1], axis=-1), position_B)
            return memory, logits_BV

        return jax.lax.fori_loop(0, 9, body, (memory, jnp.zeros((batch, V))))

    text = jax.jit(loop, donate_argnums=0).lower(memory, np.full(batch, T)).compile().as_text()
    body, _, _ = text.partition("ENTRY")  # what the entry copies, it copies once
    keys = memory[0][0][1].k_BKSH  # of a global layer
    copies = re.findall(rf"f32\[{','.join(map(str, keys.shape))}\]\S* copy\(", body)
    assert "dynamic-update-slice" in body
    assert not copies
