"""A Flax module, linen or nnx, trained by the one train step."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from lmjax.data.batch import Batch
from lmjax.metrics import finish
from lmjax.models.flax_model import from_linen, from_nnx
from lmjax.models.model import Model
from lmjax.optim import optimizers
from lmjax.optim.config import OptimizerConfig, ScheduleConfig, hyper
from lmjax.train.objective import LossConfig, language_model
from lmjax.train.state import TrainState, zero_counters
from lmjax.train.step import make_step
from lmjax.weights import Params, Weight, by_path, count

pytestmark = pytest.mark.usefixtures("quick_compilation")

V, D, F = 11, 8, 16
TOKENS_BT = np.tile(np.arange(12, dtype=np.int32), (4, 1)) % V  # each token tells the next


class LinenBigram(linen.Module):
    """Logits of the next token from the present one alone."""

    @linen.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = linen.LayerNorm()(linen.Embed(V, D)(tokens_BT))
        return linen.Dense(V)(linen.relu(linen.Dense(F)(x_BTD)))


class NnxBigram(nnx.Module):
    """The same in nnx, its layers in a list."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, V, rngs=rngs)])

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        first, second = self.layers
        return second(nnx.relu(first(self.norm(self.embed(tokens_BT)))))


def linen_case() -> tuple[Model, Params, jax.Array]:
    model, params = from_linen(LinenBigram(), TOKENS_BT, jax.random.key(0))
    return model, params, LinenBigram().apply({"params": params}, TOKENS_BT)


def nnx_case() -> tuple[Model, Params, jax.Array]:
    module = NnxBigram(nnx.Rngs(0))
    return *from_nnx(module), module(TOKENS_BT)


Case = Callable[[], tuple[Model, Params, Any]]


@pytest.mark.parametrize("case", [linen_case, nnx_case])
def test_logits_are_the_modules_own(case: Case) -> None:
    model, params, expected = case()
    logits_BTV = model.logits(params, TOKENS_BT)
    assert logits_BTV.dtype == jnp.float32
    np.testing.assert_array_equal(logits_BTV, expected)


@pytest.mark.parametrize("case", [linen_case, nnx_case])
def test_loss_falls(case: Case) -> None:
    model, params, _ = case()
    cfg = OptimizerConfig(learning_rate=0.05, schedule=ScheduleConfig(name="constant", warmup=0))
    optimizer = optimizers.build(cfg, model.spec)
    step = jax.jit(make_step(language_model(model, LossConfig(chunk=4)), optimizer, microbatches=2))
    state = TrainState(params, optimizer.init(params), hyper(cfg, steps=30), {}, zero_counters())
    inputs_BT, targets_BT = TOKENS_BT[:, :-1], TOKENS_BT[:, 1:]
    batch = Batch(inputs_BT, targets_BT, np.ones(inputs_BT.shape, np.float32), np.arange(4))
    losses = []
    for _ in range(30):
        state, metrics = step(state, {}, batch)
        losses.append(finish(metrics)["loss"])
    assert losses[0] > 1.5
    assert losses[-1] < 0.2
    moved = jax.tree.map(lambda old, new: bool(jnp.any(old != new)), params, state.params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("case", [linen_case, nnx_case])
def test_spec_says_what_each_array_is(case: Case) -> None:
    model, params, _ = case()
    spec, arrays = by_path(model.spec), by_path(params)
    assert {path: weight.shape for path, weight in spec.items()} == {path: x.shape for path, x in arrays.items()}
    kinds = [(kind, len(list(group))) for kind, group in itertools.groupby(sorted(w.kind for w in spec.values()))]
    assert kinds == [("bias", 3), ("lookup", 1), ("matmul", 2), ("scale", 1)]
    matrices = [weight for weight in spec.values() if weight.kind == "matmul"]
    assert sorted(weight.fan_in for weight in matrices) == [D, F]
    assert count(model.spec).matmul == D * F + F * V


def test_what_a_module_would_ignore_is_refused() -> None:
    model, params, _ = linen_case()
    with pytest.raises(ValueError, match=r"not segments_BT; use data\.documents=joined"):
        model.hidden(params, TOKENS_BT, segments_BT=TOKENS_BT * 0, positions_BT=None)


def test_spec_axes_are_named_apart() -> None:
    model, _, _ = linen_case()
    for weight in by_path(model.spec).values():
        assert isinstance(weight, Weight)
        assert len(set(weight.names)) == len(weight.names) == len(weight.shape)
