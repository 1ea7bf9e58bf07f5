"""LoRA computes what its formula says; what holds of all adapters is in test_adapters.py."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.windows import as_batch
from lmjax.finetune.low_rank import LowRank, attached, factors
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate_ids
from lmjax.models import architectures
from lmjax.models.read import as_array
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.train.config import AdapterConfig
from lmjax.train.step import accumulate, sample_keys
from lmjax.weights import Params, Weight, map_weights
from tests.finetune.test_parts import config

pytestmark = pytest.mark.usefixtures("quick_compilation")

EVERYWHERE = ("segments/*", "embed")


def targets(family: str) -> tuple[str, ...]:
    tied = config(family).model.tied
    return EVERYWHERE if tied else (*EVERYWHERE, "unembed")


def made(family: str, **adapter: Any) -> tuple[Any, Params, Params]:
    """(the task, frozen weights, params with both factors drawn)."""
    task = without_data(config(family, tune={"adapter": {"rank": 3, "targets": targets(family), **adapter}}))
    experiment = assemble.assemble(task)
    params = assemble.initial_state(experiment).params
    return task, assemble.frozen_params(experiment), params


def drawn(params: Params) -> Params:
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: jnp.float32(0.1 * rng.standard_normal(x.shape)), params)


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "llama3"])
def test_it_generates_as_merged(family: str) -> None:
    task, frozen, params = made(family)
    model, tuned = task.language.model, task.language.weights(frozen, drawn(params))
    cfg = GenerateConfig(tokens=8, temperature=0.0, stop_at_endoftext=False)
    ids = [
        generate_ids(model, weights, [[1, 2, 3], [7]], cfg, vocab=61, endoftext=0)
        for weights in (tuned, map_weights(as_array, model.spec, tuned))
    ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(("rank_stabilized", "scale"), [(False, 12 / 3), (True, 12 / 3**0.5)])
def test_the_scale_is_alpha_over_the_rank_or_its_root(rank_stabilized: bool, scale: float) -> None:
    weight = Weight("embed -> mlp", sizes=(4, 5))
    cfg = AdapterConfig(rank=3, alpha=12.0, rank_stabilized=rank_stabilized)
    w, down, up = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(4, 5), (4, 3), (3, 5)]))
    one = attached(weight, cfg, w, {"down": down, "up": up}, None)
    np.testing.assert_allclose(one.as_array(weight), w + scale * down @ up, rtol=1e-6)


def test_copies_have_factors_of_their_own() -> None:
    beside = factors(Weight("layers experts | embed -> expert_mlp", sizes=(2, 5, 24, 40), active=2), 3)
    assert beside["down"].axes == "layers experts | embed -> rank" and beside["down"].shape == (2, 5, 24, 3)
    assert beside["up"].axes == "layers experts | rank -> expert_mlp" and beside["up"].shape == (2, 5, 3, 40)


# Gradients --------------------------------------------------------------------------------------------------------


def batch_of(task: Any) -> Any:
    rows_BU = np.random.default_rng(0).integers(0, 61, (2, 13)).astype(np.int32)
    return as_batch(rows_BU, rows_BU, np.arange(2), task.cfg.data.documents)


def test_the_gradient_is_that_of_the_merged_model() -> None:
    """By the chain rule: of W + s A B with respect to A and B, whatever else the base weighs."""
    task, frozen, params = made("llama3", alpha=6.0)
    params, model, batch = drawn(params), architectures.build(task.cfg.model), batch_of(task)
    hyper = {**task.objective.scalars}

    def merged_loss(params: Params) -> jax.Array:
        weights = map_weights(as_array, model.spec, task.language.weights(frozen, params))
        plain = without_data(config("llama3"))
        return plain.objective.loss(weights, {}, batch, None, hyper)[0]

    wanted = jax.jit(jax.grad(merged_loss))(params)
    found = jax.jit(jax.grad(lambda p: task.objective.loss(p, frozen, batch, None, hyper)[0]))(params)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), found, wanted)


def test_dropout_is_named_by_sample_and_layer_and_keeps_the_mean() -> None:
    x_BTD, keys_B = jnp.ones((2, 300, 40)), jax.vmap(jax.random.key)(jnp.arange(2))
    one = LowRank(jnp.zeros((40, 4)), jnp.ones((40, 2)), jnp.ones((2, 4)), keys_B, 1.0, 0.25)

    def dot(x: jax.Array, w: jax.Array, **_: Any) -> jax.Array:
        return x @ w

    y_BTD = one.multiply(x_BTD, dot)
    assert abs(float(y_BTD.mean()) / 80 - 1) < 0.01 and not np.array_equal(y_BTD[0], y_BTD[1])
    swapped = dataclasses.replace(one, keys_B=keys_B[::-1]).multiply(x_BTD, dot)
    np.testing.assert_array_equal(swapped, y_BTD[::-1])
    np.testing.assert_array_equal(dataclasses.replace(one, keys_B=None).multiply(x_BTD, dot), jnp.full((2, 300, 4), 80))


@pytest.mark.slow
def test_dropout_does_not_depend_on_microbatches() -> None:
    task = without_data(config("llama3", tune={"adapter": {"rank": 3, "dropout": 0.3}}))
    experiment = assemble.assemble(task)
    state, frozen, batch = assemble.initial_state(experiment), assemble.frozen_params(experiment), batch_of(task)
    state = dataclasses.replace(state, params=drawn(state.params))
    keys_B = sample_keys(state.hyper["seed"], batch.ids_B)
    gradients = functools.partial(accumulate, task.objective)
    whole, pieces, none = (
        jax.jit(gradients, static_argnums=4)(state, frozen, batch, keys, n)[0]
        for keys, n in ((keys_B, 1), (keys_B, 2), (None, 1))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, pieces)
    assert any(not np.allclose(a, b, rtol=0.1) for a, b in zip(*map(jax.tree.leaves, (whole, none)), strict=True))
