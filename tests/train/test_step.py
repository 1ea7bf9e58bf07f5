"""The train step: exact accumulation, the finite gate, one compilation, donation, named randomness."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.batch import Batch
from lmjax.metrics import finish
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.models.dropout import dropout
from lmjax.optim import optimizers
from lmjax.optim.config import OptimizerConfig, ScheduleConfig, hyper
from lmjax.train.config import LossConfig
from lmjax.train.objective import Objective, language_model, scalar_arrays
from lmjax.train.state import TrainState, zero_counters
from lmjax.train.step import accumulate, make_step, sample_keys
from lmjax.weights import Spec, Weight, initialize

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = ModelConfig(vocab=31, context=16, layers=2, embed=16, mlp=24, dropout=0.2, embed_dropout=0.1)
OPTIMIZER = OptimizerConfig(learning_rate=0.01, clip_norm=None, schedule=ScheduleConfig(name="constant", warmup=0))
MODEL = decoder.build(CFG)
OBJECTIVE = language_model(MODEL, LossConfig(chunk=5, z_weight=1e-2))
B, T = 12, 11


def random_batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens_BT = rng.integers(31, size=(B, T + 1)).astype(np.int32)
    weights_BT = (np.arange(T) < rng.integers(T + 1, size=(B, 1))).astype(np.float32)
    weights_BT[:3] = np.array([0.0, 1.0, 0.3])[:, None]  # no weight at all, all, and a fraction
    ids_B = rng.permutation(1000)[:B].astype(np.int32)
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], weights_BT, ids_B)


def scalars(seed: int = 0) -> Any:
    return hyper(OPTIMIZER, steps=10, seed=seed) | scalar_arrays(OBJECTIVE.scalars)


def start(spec: Spec = MODEL.spec) -> TrainState:
    optimizer = optimizers.build(OPTIMIZER, spec)
    params = initialize(spec, jax.random.key(0))
    return TrainState(params, optimizer.init(params), scalars(seed=3), zero_counters())


def test_accumulation_is_one_batch() -> None:
    state, batch = start(), random_batch()

    def gradient(microbatches: int) -> Any:
        def run(state: TrainState, batch: Batch) -> Any:
            keys_B = sample_keys(state.hyper["seed"], batch.ids_B)
            return accumulate(OBJECTIVE, state, {}, batch, keys_B, microbatches)

        return jax.jit(run)(state, batch)

    whole, whole_metrics = gradient(1)
    assert finish(whole_metrics).keys() == {"loss", "accuracy", "z_loss"}
    pieces, metrics = gradient(4)
    for name, (total, weight) in metrics.items():
        np.testing.assert_allclose((total, weight), whole_metrics[name], rtol=1e-6, err_msg=name)
    for got, want in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


def test_dropout_masks_belong_to_samples() -> None:
    batch = random_batch()
    params = initialize(MODEL.spec, jax.random.key(0))
    hidden = jax.jit(lambda tokens_BT, ids_B, seed: MODEL.hidden(params, tokens_BT, keys_B=sample_keys(seed, ids_B))[0])
    order = np.random.default_rng(1).permutation(B)
    x_BTD = hidden(batch.tokens_BT, batch.ids_B, 3)
    np.testing.assert_array_equal(hidden(batch.tokens_BT[order], batch.ids_B[order], 3), x_BTD[order])
    for other in (hidden(batch.tokens_BT, batch.ids_B + 1, 3), hidden(batch.tokens_BT, batch.ids_B, 4)):
        assert not np.any(np.all(np.asarray(other == x_BTD), axis=(1, 2)))


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    ones = jnp.ones((4, 64, 64))
    keys_B = sample_keys(jnp.uint32(0), jnp.arange(4))
    dropped = dropout(ones, keys_B, 0.25, 0, 0)
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert dropout(ones, None, 0.25, 0, 0) is ones


# The whole step ---------------------------------------------------------------------------------------------------


def test_step_is_compiled_once_and_gives_its_state_away() -> None:
    traces = 0

    def counted(*arguments: Any) -> Any:
        nonlocal traces
        traces += 1
        return OBJECTIVE.loss(*arguments)

    objective = OBJECTIVE._replace(loss=counted)
    step = jax.jit(make_step(objective, optimizers.build(OPTIMIZER, MODEL.spec)), donate_argnums=0)
    state = start()
    losses = []
    for number in range(4):
        changed = {"learning_rate": jnp.float32(0.01 + number / 100), "seed": jnp.uint32(number)}
        state = dataclasses.replace(state, hyper=state.hyper | changed)
        given = jax.tree.leaves((state.params, state.opt_state))
        state, metrics = step(state, {}, random_batch())
        assert all(leaf.is_deleted() for leaf in given)
        values = finish(metrics)
        assert values["lr"] == pytest.approx(0.01 + number / 100)
        losses.append(values["loss"])
    assert traces == 1
    assert losses == sorted(losses, reverse=True)
    assert (int(state.counters.step), int(state.counters.skipped)) == (4, 0)


def test_frozen_weights_are_read_and_not_moved() -> None:
    params = initialize(MODEL.spec, jax.random.key(0))
    frozen = {"embed": params.pop("embed")}
    spec = {name: weight for name, weight in MODEL.spec.items() if name != "embed"}
    optimizer = optimizers.build(OPTIMIZER, spec)
    state = TrainState(params, optimizer.init(params), scalars(), zero_counters())
    new, metrics = jax.jit(make_step(OBJECTIVE, optimizer))(state, frozen, random_batch())
    assert new.params.keys() == params.keys()
    whole = {**params, **frozen}
    batch = random_batch()
    keys_B = sample_keys(jnp.uint32(0), batch.ids_B)
    minimized, _ = jax.jit(OBJECTIVE.loss)(whole, {}, batch, keys_B, scalars())
    total, weight = metrics["loss"]
    z_loss, _ = metrics["z_loss"]
    assert float(total + z_loss) == pytest.approx(float(minimized), rel=1e-5)
    assert float(weight) == pytest.approx(float(batch.weights_BT.sum()))


def test_a_batch_without_weight_moves_nothing_through_the_loss() -> None:
    state, batch = start(), random_batch()
    batch = dataclasses.replace(batch, weights_BT=np.zeros_like(batch.weights_BT))
    gradients, metrics = jax.jit(lambda state, batch: accumulate(OBJECTIVE, state, {}, batch, None, 1))(state, batch)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))
    assert finish(metrics) == {}


# The finite gate --------------------------------------------------------------------------------------------------

SPEC: Spec = {"w": Weight("-> embed", kind="scale", sizes=(3,))}


def toy(trouble: str) -> Objective:
    """A loss whose first token decides whether the loss, or the gradient alone, is not a number."""

    def loss(params: Any, frozen: Any, batch: Batch, keys_B: Any, hyper: Any) -> Any:
        w, bad = params["w"], batch.tokens_BT[0, 0] == 1
        zero = jnp.where(bad, 0.0, 1.0) * w.sum()
        extra = jnp.sqrt(jnp.abs(zero)) if trouble == "gradient" else jnp.where(bad, jnp.inf, 0.0)
        total = jnp.sum(w * w) + extra
        return total, {"loss": (total, jnp.ones(()))}

    return Objective(weight=lambda batch: batch.weights_BT.sum(), loss=loss)


@pytest.mark.parametrize("trouble", ["loss", "gradient"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_update_that_is_not_finite_is_left_out_and_counted(trouble: str, microbatches: int) -> None:
    optimizer = optimizers.build(OPTIMIZER, SPEC)
    step = jax.jit(make_step(toy(trouble), optimizer, microbatches=microbatches))
    good, bad = (
        Batch(np.full((2, 1), token, np.int32), np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32), np.arange(2))
        for token in (0, 1)
    )
    state = start(SPEC)
    expected_counts = [(1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 2, 0), (5, 3, 1)]  # step, skipped, skipped in a row
    for batch, expected in zip([good, bad, bad, good, bad], expected_counts, strict=True):
        new, metrics = step(state, {}, batch)
        before, after = (jax.tree.leaves((s.params, s.opt_state)) for s in (state, new))
        same = [np.array_equal(x, y) for x, y in zip(before, after, strict=True)]
        assert all(same) if batch is bad else not any(same)
        assert all(np.all(np.isfinite(x)) for x in after)
        assert finish(metrics)["skipped"] == (batch is bad)
        if trouble == "gradient":
            assert np.isfinite(finish(metrics)["loss"])
        counters = new.counters
        assert (int(counters.step), int(counters.skipped), int(counters.skipped_in_a_row)) == expected
        state = new


# The average of the weights ---------------------------------------------------------------------------------------


def test_the_average_is_that_of_the_weights_after_each_update() -> None:
    """Those of an update that was left out, too; and it changes nothing of them."""
    decay, optimizer = 0.8, optimizers.build(OPTIMIZER, SPEC)
    step = jax.jit(make_step(toy("loss"), optimizer))
    plain = start(SPEC)
    state = dataclasses.replace(plain, hyper=plain.hyper | {"average_decay": jnp.float32(decay)}, average=plain.params)
    weights = []
    for token in (0, 0, 1, 0):
        batch = Batch(np.full((2, 1), token, np.int32), np.zeros((2, 1), np.int32), np.ones((2, 1)), np.arange(2))
        (plain, _), (state, _) = step(plain, {}, batch), step(state, {}, batch)
        np.testing.assert_array_equal(state.params["w"], plain.params["w"])
        weights.append(np.asarray(state.params["w"]))
        shares = decay ** np.arange(len(weights))[::-1]
        np.testing.assert_allclose(state.delivered["w"], np.average(weights, axis=0, weights=shares), rtol=1e-6)


# The gradient noise scale -----------------------------------------------------------------------------------------


def test_noise_and_signal_are_those_of_the_rows_gradients() -> None:
    """On average: the gradient of a row is a random vector of known mean and covariance."""
    mean_O, spread_O = np.array([0.3, -0.2, 0.1]), np.array([1.0, 0.5, 2.0])
    rows, steps = 8, 2000

    def loss(params: Any, frozen: Any, batch: Batch, keys_B: Any, hyper: Any) -> Any:
        total = jnp.sum(batch.weights_BT * params["w"])  # each row holds its own gradient
        return total, {"loss": (total, jnp.ones(()))}

    objective = Objective(weight=lambda batch: jnp.float32(len(batch.ids_B)), loss=loss)
    step = make_step(objective, optimizers.build(OPTIMIZER, SPEC), microbatches=4, noise_scale=True)
    state = start(SPEC)
    draws_SBO = np.random.default_rng(0).normal(mean_O, spread_O, (steps, rows, 3)).astype(np.float32)
    zeros_BT = np.zeros((rows, 3), np.int32)
    _, metrics = jax.jit(
        lambda draws: jax.lax.map(lambda x: step(state, {}, Batch(zeros_BT, zeros_BT, x, np.arange(rows))), draws)
    )(draws_SBO)
    values = finish(metrics)
    assert values["noise_signal"].mean() == pytest.approx(np.sum(mean_O**2), abs=0.05)
    assert values["noise_trace"].mean() == pytest.approx(np.sum(spread_O**2), rel=0.03)
