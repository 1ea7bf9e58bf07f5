"""Long sums are kept in float32 whatever a model computes in; above all gradients, which add up all tokens."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.batch import Batch
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.models.linear import linear
from lmjax.train.config import LossConfig
from lmjax.train.objective import language_model, scalar_arrays
from lmjax.weights import Spec, abstract, by_path, initialize, map_weights, normal

pytestmark = pytest.mark.usefixtures("quick_compilation")

LONG = 16
"""Terms. Sums over a token's few experts are shorter."""


def gradient(cfg: ModelConfig, B: int, T: int) -> tuple[Callable[[Any], Any], Spec]:
    """(the gradient of the mean loss of random tokens as a function of params, the spec)"""
    model = decoder.build(cfg)
    tokens_BT = np.random.default_rng(0).integers(0, cfg.vocab or 0, (B, T + 1)).astype(np.int32)
    batch = Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], np.ones((B, T), np.float32), np.arange(B))
    objective = language_model(model, LossConfig(chunk=T // 2, z_weight=1e-3))

    def loss(params: Any) -> jax.Array:
        keys_B = jax.vmap(jax.random.key)(batch.ids_B) if cfg.moe.dispatch == "capacity" else None
        total, _ = objective.loss(params, {}, batch, keys_B, scalar_arrays(objective.scalars))
        return sum(jax.tree.leaves(total)) / (B * T)

    return jax.grad(loss), model.spec


def with_capacity(cfg: ModelConfig) -> list[ModelConfig]:
    """The config, and of a mixture of experts the one of fixed sizes."""
    one = replace(cfg, dropout=0.0, embed_dropout=0.0, dtype="bfloat16")
    return [one] if cfg.moe.experts is None else [one, replace(one, moe=replace(one.moe, dispatch="capacity"))]


def test_no_sum_is_long_in_16_bits(cfg: ModelConfig) -> None:
    """In the program of the loss and its gradient."""
    for one in with_capacity(cfg):
        function, spec = gradient(one, B=32, T=64)
        sums = list(sums_of(jax.make_jaxpr(function)(abstract(spec)).jaxpr))
        assert any(dtype == jnp.float32 and terms >= 32 for _, dtype, terms in sums), "all sums were overlooked"
        assert not [found for found in sums if found[1].itemsize == 2 and found[2] > LONG]


def sums_of(jaxpr: Any) -> Iterator[tuple[str, Any, float]]:
    """(how, type, terms of a result) of each sum but matrix products, which keep theirs in float32."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("reduce_sum", "cumsum", "scatter-add", "reduce_window_sum"):
            first, out = equation.invars[0].aval, equation.outvars[0].aval
            terms = math.prod(first.shape) / math.prod(out.shape)
            if name == "scatter-add":
                terms = equation.invars[2].aval.size / out.size  # on average
            yield f"{name} {equation.source_info.name_stack}", out.dtype, terms
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sums_of(inner)


def test_a_bias_counts_every_token() -> None:
    x_BTD, w_DF = jnp.ones((64, 1024, 4), jnp.bfloat16), jnp.eye(4, dtype=jnp.bfloat16)
    dbias_F = jax.grad(lambda bias_F: linear(x_BTD, w_DF, bias_F).astype(jnp.float32).sum())(jnp.zeros(4))
    np.testing.assert_array_equal(dbias_F, 64 * 1024)


def test_gradients_in_16_bits_are_those_in_float32(cfgs: dict[str, ModelConfig]) -> None:
    check_gradients(cfgs["olmo2"])


@pytest.mark.slow
def test_gradients_of_every_family_in_16_bits_are_those_in_float32(cfg: ModelConfig) -> None:
    check_gradients(cfg)


def check_gradients(cfg: ModelConfig) -> None:
    """Of every weight over 16,384 tokens, to what activations in bfloat16 leave of it.

    A bias of all keys alike has no gradient but where they are rotated: what is small beside the others is left out.
    """
    B, T = 128, 128
    cfg = with_capacity(cfg)[0]
    cfg = replace(cfg, layers=len(cfg.pattern) + cfg.moe.dense_first, context=T)
    function, spec = gradient(cfg, B, T)
    spread = map_weights(lambda weight: replace(weight, init=normal(0.05)), spec)  # for biases to matter
    params = jax.jit(lambda key: jax.tree.map(jnp.add, initialize(spec, key), initialize(spread, key)))(
        jax.random.key(0)
    )
    exact = by_path(jax.jit(gradient(replace(cfg, dtype="float32"), B, T)[0])(params))
    largest = max(np.linalg.norm(x) for x in exact.values() if x.dtype == jnp.float32)
    for path, x in by_path(jax.jit(function)(params)).items():
        if x.dtype == jnp.float32:
            off, size = np.linalg.norm(x - exact[path]), np.linalg.norm(exact[path])
            assert off < 0.15 * size + 1e-3 * largest, (path, off, size)
