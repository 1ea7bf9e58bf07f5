"""What stands in front of every text is seen by all of it, and by each document of a row alike; a cache begins with
it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import ConfigError
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate_ids
from lmjax.models.front import places
from lmjax.models.model import Model
from lmjax.models.read import as_array
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.weights import Params, map_weights
from tests.finetune.test_low_rank import drawn
from tests.finetune.test_parts import config
from tests.generate.test_forward import check_stepwise

pytestmark = pytest.mark.usefixtures("quick_compilation")

KINDS = ("prompt", "prefix")
P = 4
CASES = [("prompt", "gemma2"), ("prefix", "gemma2")]
"""Windows are about as long as what is in front."""
OTHERS = [
    pytest.param(kind, family, marks=pytest.mark.slow) for kind in KINDS for family in ("gpt2", "llama3", "alibi")
]


@functools.cache
def made(kind: str, family: str) -> tuple[Model, Params, Params]:
    """(the model, the base's weights, those with P drawn places in front)."""
    task = without_data(config(family, tune={"adapter": {"name": kind, "length": P}}))
    experiment = assemble.assemble(task)
    frozen, params = assemble.frozen_params(experiment), assemble.initial_state(experiment).params
    assert task.language is not None
    moved = jax.tree.map(lambda start, x: start + 10 * x, params, drawn(params))
    return task.language.scorer, frozen["base"], task.language.weights(frozen, moved)


def logits(model: Model, params: Params, tokens_BT: Any, **inputs: Any) -> jax.Array:
    made: jax.Array = jax.jit(model.logits)(params, jnp.asarray(tokens_BT), **inputs)
    return made


@pytest.mark.parametrize(("kind", "family"), [*CASES, *OTHERS])
def test_each_document_of_a_row_is_as_if_it_were_alone(kind: str, family: str) -> None:
    model, base, weights = made(kind, family)
    assert places(weights) == P and places(base) == 0
    tokens_BT = np.random.default_rng(0).integers(61, size=(2, 12))
    segments_BT = np.array([[0] * 5 + [1] * 4 + [-1] * 3, [0] * 12])
    positions_BT = np.array([[*range(5), *range(4), -1, -1, -1], [*range(12)]])
    row_BTV = logits(model, weights, tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT)
    documents = ((0, 0, 5), (0, 5, 9), (1, 0, 12))
    alone_BT = np.stack([np.resize(tokens_BT[row, start:stop], 12) for row, start, stop in documents])
    alone_BTV = logits(model, weights, alone_BT)  # whose ends none of the tokens before them sees
    for (row, start, stop), one_TV in zip(documents, alone_BTV, strict=True):
        np.testing.assert_allclose(row_BTV[row, start:stop], one_TV[: stop - start], rtol=0, atol=1e-5)
    assert float(jnp.abs(alone_BTV - logits(model, base, alone_BT)).max()) > 0.05


@pytest.mark.parametrize(("kind", "family"), [*CASES[:1], *OTHERS])
def test_decoding_from_a_cache_is_one_pass_over_the_text(kind: str, family: str) -> None:
    model, _, weights = made(kind, family)
    check_stepwise(model, weights)


@pytest.mark.parametrize("kind", ["prefix", pytest.param("prompt", marks=pytest.mark.slow)])
def test_texts_are_written_in_rows(kind: str) -> None:
    """Three prompts in two rows, so that one takes a row that another has left."""
    model, _, weights = made(kind, "gemma2")
    prompts = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [4]]
    named = {"endoftext": 0, "vocab": 61, "stops": (60,)}
    texts = generate_ids(model, weights, prompts, GenerateConfig(tokens=6, temperature=0, rows=2), **named)
    for prompt, text in zip(prompts, texts, strict=True):
        read_1T = np.resize([*prompt, *text], (1, 13))
        best_T = logits(model, weights, read_1T)[0].argmax(-1)
        assert best_T[len(prompt) - 1 :][: len(text)].tolist() == text


@pytest.mark.parametrize("kind", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_a_learned_table_of_positions_has_to_hold_it_too(kind: str) -> None:
    model, _, weights = made(kind, "gpt2")
    with pytest.raises(ConfigError, match="a sequence of 129 tokens is longer than the position table"):
        logits(model, weights, np.zeros((1, 125), np.int32))
    with pytest.raises(ConfigError, match=r"model\.context=128, 4 of them in front of the prompt; ask for at most 24"):
        generate_ids(model, weights, [[1] * 101], GenerateConfig(tokens=25), endoftext=0, vocab=61)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_never_taken_for_a_weight(kind: str) -> None:
    model, _, weights = made(kind, "gemma2")
    with pytest.raises(ConfigError, match="cannot be merged"):
        map_weights(as_array, model.spec, weights)


def test_a_prefix_has_keys_and_values() -> None:
    tune = {"adapter": {"name": "prefix", "targets": ("key",)}}
    with pytest.raises(ConfigError, match="a prefix has keys and values; name both of a layer, or none"):
        without_data(config("llama3", tune=tune))
