"""Matrices in fewer bits give nearly what they stand for, in every model, with every adapter, for every row alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from lmjax.errors import ConfigError
from lmjax.finetune.adapters import ADAPTERS
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate_ids
from lmjax.generate.small import BFloat16Matrix, Int8Matrix, int8_matrix, small_weights
from lmjax.models import decoder, flax_model
from lmjax.models.config import ModelConfig
from lmjax.models.linear import linear
from lmjax.weights import Params, Weight
from tests.finetune.test_adapters import made, moved
from tests.generate.test_forward import V, random_texts, stepwise_logits, whole_logits
from tests.random_params import random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = (BFloat16Matrix, Int8Matrix)
AWAY = {"bfloat16": 0.02, "int8": 0.04}
"""How far a logit is on average from that of float32, over the spread of logits."""


def matrix(axes: str, *sizes: int) -> tuple[Weight, jax.Array]:
    """Values with a column and a row of zeros, and one column that is a thousand times as large."""
    w = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
    w[..., 0], w[0], w[..., 1] = 0, 0, 1000 * w[..., 1]
    return Weight(axes, sizes=sizes), jnp.asarray(w)


@pytest.mark.parametrize("rows", [(1,), (2, 3)])
@pytest.mark.parametrize(
    ("weight_and_values", "contract"),
    [(matrix("embed -> heads head_dim", 48, 4, 6), 1), (matrix("heads head_dim -> embed", 4, 6, 20), 2)],
)
def test_a_product_in_8_bits_is_off_by_the_rounding_of_its_factors(
    weight_and_values: tuple[Weight, jax.Array], contract: int, rows: tuple[int, ...]
) -> None:
    weight, w = weight_and_values
    x = jnp.asarray(np.random.default_rng(1).standard_normal((*rows, *w.shape[:contract])), jnp.float32)
    found = linear(x, int8_matrix(weight, w), contract=contract)
    x_RI, w_IO = (np.asarray(x, np.float64).reshape(-1, 48 // contract), np.asarray(w, np.float64))
    w_IO = w_IO.reshape(x_RI.shape[1], -1)
    half_x_R1 = np.abs(x_RI).max(axis=1, keepdims=True) / 254
    half_w_1O = np.abs(w_IO).max(axis=0, keepdims=True) / 254
    most = np.abs(x_RI) @ np.broadcast_to(half_w_1O, w_IO.shape) + half_x_R1 * np.abs(w_IO).sum(axis=0)
    most += len(w_IO) * half_x_R1 * half_w_1O
    away = np.abs(np.asarray(found).reshape(len(x_RI), -1) - x_RI @ w_IO)
    assert found.shape == (*rows, *w.shape[contract:])
    assert (away <= most * (1 + 1e-5)).all()
    assert away.max() > 0


def test_a_row_in_8_bits_is_the_same_alone() -> None:
    """Sums of integers are exact, whatever way a processor takes for one row."""
    w = int8_matrix(*matrix("embed -> mlp", 300, 40))
    x_RI = jax.random.normal(jax.random.key(0), (5, 300))
    alone = [linear(x_RI[row : row + 1], w)[0] for row in range(5)]
    np.testing.assert_allclose(linear(x_RI, w), alone, rtol=1e-6)


def away(small_BSV: np.ndarray, exact_BSV: np.ndarray) -> float:
    return float(np.abs(small_BSV - exact_BSV).mean() / exact_BSV.std())


def count(params: Params) -> int:
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, SMALL))
    return sum(isinstance(leaf, SMALL) for leaf in leaves)


@pytest.mark.parametrize("bits", ["int8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_every_family_decodes_nearly_as_in_float32(cfg: ModelConfig, bits: str) -> None:
    model = decoder.build(cfg)
    params, texts_BT = random_params(model.spec), random_texts()
    small = small_weights(model, params, bits)
    found_BSV = stepwise_logits(model, small, texts_BT)
    assert 0 < away(found_BSV, whole_logits(model, params, texts_BT)) < AWAY[bits]
    segments, head = (count(tree) for tree in (small["segments"], small["unembed"]))
    assert head == 1
    assert segments >= 4 * sum(len(period) for period, _ in cfg.segments)  # attention's, at least


@pytest.mark.parametrize("family", ["gemma3", "llama3"])  # with a tied head, and with one of its own
def test_texts_are_scored_by_the_weights_that_write_them(cfgs: dict[str, ModelConfig], family: str) -> None:
    model = decoder.build(cfgs[family])
    small, texts_BT = small_weights(model, random_params(model.spec), "int8"), random_texts()
    assert count(model.head(small)) == 1
    written_BSV = stepwise_logits(model, small, texts_BT)
    assert away(whole_logits(model, small, texts_BT), written_BSV) < AWAY["int8"] / 10


@pytest.mark.parametrize(
    "kind", [kind if kind in ("lora", "prefix") else pytest.param(kind, marks=pytest.mark.slow) for kind in ADAPTERS]
)
def test_every_adapter_stands_beside_small_matrices(kind: str) -> None:
    experiment, frozen, params = made(kind, "llama3", store="int8")
    language = experiment.task.language
    model, tuned = language.scorer, language.weights(frozen, moved(params))
    small, texts_BT = small_weights(model, tuned, "int8"), random_texts()
    assert count(small) > 4

    @jax.jit
    def logits(params: Params) -> jax.Array:
        unstacked = model.unstack(params)
        return model.unembed(unstacked, model.hidden(unstacked, texts_BT)[0])

    assert 0 < away(logits(small), logits(tuned)) < AWAY["int8"]


def test_a_foreign_model_is_refused() -> None:
    class Bigram(linen.Module):
        @linen.compact
        def __call__(self, tokens_BT: jax.Array) -> jax.Array:
            return linen.Embed(V, V)(tokens_BT)

    model, params = flax_model.from_linen(Bigram(), jnp.zeros((1, 4), jnp.int32), jax.random.key(0))
    cfg = GenerateConfig(tokens=2, weights="int8")
    with pytest.raises(ConfigError, match="weights=int8 is for lmjax's own decoder"):
        generate_ids(model, params, [[1]], cfg, vocab=V, endoftext=0)


def test_matrices_are_cast_once() -> None:
    """What decoding reads in bfloat16 is so before it begins."""
    model = decoder.build(ModelConfig(vocab=V, layers=2, embed=24, heads=4, mlp=40, dtype="bfloat16"))
    params = model.unstack(random_params(model.spec))
    types = {name: w.dtype for name, w in params["segments"]["0"][0]["0"]["mlp"].items()}
    assert {*types.values(), params["embed"].dtype} == {jnp.dtype("bfloat16")}
    assert params["final_norm"]["scale"].dtype == jnp.float32
