"""What must hold for a mixture of experts beside what holds for every decoder."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.batch import Batch
from lmjax.errors import ConfigError
from lmjax.metrics import finish
from lmjax.models import decoder, moe
from lmjax.models.config import ModelConfig, MoeConfig
from lmjax.models.linear import linear
from lmjax.models.mlp import mlp
from lmjax.optim import optimizers
from lmjax.optim.config import OptimizerConfig, hyper
from lmjax.optim.rules import OPTIMIZERS
from lmjax.train.objective import LossConfig, language_model
from lmjax.train.state import TrainState, zero_counters
from lmjax.train.step import accumulate, make_step, sample_keys
from lmjax.weights import Params, Weight, bind, by_path, initialize, map_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

replace = dataclasses.replace
B, T = 3, 16
SIZES = {"vocab": 61, "layers": 2, "embed": 12, "heads": 2, "mlp": 20}
TOLERANCE = 1e-5

LAYERS = {
    "softmax": ModelConfig(**SIZES, gated=True, moe=MoeConfig(experts=5, top_k=2)),
    "switch": ModelConfig(**SIZES, moe=MoeConfig(experts=4, top_k=1, normalize=False)),
    "sigmoid": ModelConfig(
        **SIZES, bias=True, moe=MoeConfig(experts=6, top_k=3, mlp=8, score="sigmoid", scale=2.5, bias_rate=0.01)
    ),
    "shared": ModelConfig(**SIZES, gated=True, moe=MoeConfig(experts=4, shared_mlp=16, shared_gate=True)),
    "all": ModelConfig(**SIZES, moe=MoeConfig(experts=3, top_k=3)),
}


def random_layer(cfg: ModelConfig) -> Params:
    rng = np.random.default_rng(0)

    def draw(weight: Weight) -> jax.Array:
        std = weight.unstacked().fan_in ** -0.5 if weight.kind == "matmul" else 0.3
        return jnp.asarray(std * rng.standard_normal(weight.shape), jnp.float32)

    def start(key: jax.Array, weight: Weight) -> jax.Array:
        return jnp.zeros(weight.shape)

    return map_weights(draw, bind(moe.weights(cfg, start, start), cfg.dims))


def random_input(cfg: ModelConfig, rows: int = B, length: int = T) -> tuple[jax.Array, jax.Array]:
    """Activations and which of them are real: one row is padded in front, another at its end."""
    x_BTD = jnp.asarray(np.random.default_rng(1).standard_normal((rows, length, cfg.embed)), jnp.float32)
    real_BT = np.ones((rows, length), bool)
    real_BT[0, :3] = real_BT[-1, -5:] = False
    return x_BTD, jnp.asarray(real_BT)


def dense_reference(p: Params, x_BTD: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Every token through every expert; what was not chosen has weight zero."""
    logits_BTE = x_BTD @ p["router"]
    scores_BTE = jax.nn.softmax(logits_BTE) if cfg.moe.score == "softmax" else jax.nn.sigmoid(logits_BTE)
    ranked_BTE = scores_BTE + p.get("bias", 0.0)
    rank_BTE = jnp.sum(ranked_BTE[..., None, :] > ranked_BTE[..., :, None], axis=-1)
    weights_BTE = jnp.where(rank_BTE < cfg.moe.top_k, scores_BTE, 0.0)
    if cfg.moe.normalize:
        weights_BTE /= weights_BTE.sum(axis=-1, keepdims=True)
    y_BTD = jnp.zeros_like(x_BTD)
    for e in range(cfg.moe.experts):
        expert = {name: w[e] for name, w in p["experts"].items()}
        y_BTD += cfg.moe.scale * weights_BTE[..., e, None] * mlp(expert, x_BTD, cfg)
    if "shared" in p:
        y_BTD += jax.nn.sigmoid(linear(x_BTD, p["shared_gate"])) * mlp(p["shared"], x_BTD, cfg)
    return y_BTD


def with_gradient(function: Any, p: Params, x_BTD: jax.Array) -> Any:
    """(output, gradients of a generic function of it with respect to weights and input)."""
    direction = jnp.asarray(np.random.default_rng(2).standard_normal(x_BTD.shape), jnp.float32)

    def scalar(p: Params, x_BTD: jax.Array) -> Any:
        y_BTD = function(p, x_BTD)
        return jnp.sum(jnp.sin(y_BTD) * direction), y_BTD

    gradients, y_BTD = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(p, x_BTD)
    return y_BTD, gradients


def assert_close(got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1, float(jnp.max(jnp.abs(other)))))


# The layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize("name", LAYERS)
def test_dispatch_equals_a_loop_over_experts(name: str, dispatch: Any) -> None:
    """With room for everything, which is what `capacity_factor` = experts / top_k gives, capacity too."""
    cfg = LAYERS[name]
    cfg = replace(cfg, moe=replace(cfg.moe, dispatch=dispatch, capacity_factor=cfg.moe.experts / cfg.moe.top_k))
    p, (x_BTD, _) = random_layer(cfg), random_input(cfg)
    real_BT = jnp.ones((B, T), bool)
    got = with_gradient(lambda p, x_BTD: moe.mixture(p, x_BTD, real_BT, cfg, training=True)[0], p, x_BTD)
    assert_close(got, with_gradient(lambda p, x_BTD: dense_reference(p, x_BTD, cfg), p, x_BTD))


def test_a_tie_goes_to_the_expert_of_lower_index() -> None:
    scores_BTE = jnp.asarray([[[0.1, 0.4, 0.4, 0.1], [0.25, 0.25, 0.25, 0.25]]])
    routing = moe.choose(scores_BTE, None, jnp.ones((1, 2), bool), MoeConfig(experts=4, top_k=3))
    assert routing.chosen_BTX.tolist() == [[[1, 2, 0], [0, 1, 2]]]
    np.testing.assert_allclose(routing.weights_BTX, [[[4 / 9, 4 / 9, 1 / 9], [1 / 3, 1 / 3, 1 / 3]]], rtol=1e-6)


def test_a_bias_moves_the_choice_and_not_the_weights() -> None:
    scores_BTE = jnp.asarray([[[0.5, 0.3, 0.2]]])
    routing = moe.choose(
        scores_BTE, jnp.asarray([-1.0, 0.0, 0.5]), jnp.ones((1, 1), bool), MoeConfig(experts=3, top_k=2)
    )
    assert routing.chosen_BTX.tolist() == [[[2, 1]]]
    np.testing.assert_allclose(routing.weights_BTX, [[[0.4, 0.6]]], rtol=1e-6)


# Capacity ---------------------------------------------------------------------------------------------------------


def skewed(tokens: int, favourite: int, cfg: ModelConfig) -> tuple[Params, jax.Array]:
    """A layer and inputs whose every token chooses expert `favourite` first."""
    p = random_layer(cfg)
    x_BTD = jnp.concatenate([jnp.ones((1, tokens, 1)), random_input(cfg, 1, tokens)[0][..., 1:]], axis=-1)
    return p | {"router": p["router"].at[0, favourite].set(100.0)}, x_BTD


def test_who_finds_room_by_hand() -> None:
    """Eight tokens, one choice each, room for two: of the padded first, two padded ones take nothing."""
    cfg = LAYERS["switch"]
    cfg = replace(cfg, moe=replace(cfg.moe, dispatch="capacity", capacity_factor=1.0))
    p, x_BTD = skewed(8, 2, cfg)
    assert moe.room(8, cfg.moe) == 2
    real_BT = jnp.asarray([[False, True, True, False, True, True, True, True]])
    y_BTD, tally = moe.mixture(p, x_BTD, real_BT, cfg, training=True)
    assert np.any(y_BTD != 0, axis=-1).tolist() == [[False, True, True, False, False, False, False, False]]
    assert float(tally.dropped) == 4
    assert tally.load_E.tolist() == [0, 0, 6, 0]
    y_BTD, tally = moe.mixture(p, x_BTD, real_BT, cfg, training=False)
    assert np.all(np.any(y_BTD != 0, axis=-1)) and float(tally.dropped) == 0


def test_a_later_token_takes_no_room_from_an_earlier_one() -> None:
    """Whatever tokens after t are, outputs up to t stay, where experts are full and the sequence has second choices."""
    cfg = LAYERS["softmax"]
    cfg = replace(cfg, moe=replace(cfg.moe, dispatch="capacity", capacity_factor=0.5))
    p = random_layer(cfg)
    forward = jax.jit(lambda x_BTD: moe.mixture(p, x_BTD, jnp.ones((B, T), bool), cfg, training=True))
    x_BTD, _ = random_input(cfg)
    y_BTD, tally = forward(x_BTD)
    assert float(tally.dropped) > 0.3 * B * T * cfg.moe.top_k
    for t in range(1, T):
        changed_BTD = x_BTD.at[:, t:].set(jnp.flip(x_BTD[:, t:], axis=(1, 2)))
        np.testing.assert_array_equal(forward(changed_BTD)[0][:, :t], y_BTD[:, :t])


# Losses, and what is exact ----------------------------------------------------------------------------------------


def test_balance_and_z_losses_by_hand() -> None:
    """Two tokens of three are real; E = 2, one choice: f = (1, 0) x 2, P = mean of the real tokens."""
    cfg = MoeConfig(experts=2, top_k=1, normalize=False)
    logits_BTE = jnp.log(jnp.asarray([[[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]]) * 3)
    real_BT = jnp.asarray([[True, True, False]])
    scores_BTE = moe.score(logits_BTE, cfg)
    tally = moe.observe(logits_BTE, scores_BTE, moe.choose(scores_BTE, None, real_BT, cfg), jnp.zeros(()), cfg)
    assert tally.load_E.tolist() == [2, 0]
    assert float(tally.balance) == pytest.approx(2 * (2 * 0.7), rel=1e-6)
    assert float(tally.router_z) == pytest.approx(2 * np.log(3) ** 2, rel=1e-6)


def test_perfect_balance_has_the_loss_one() -> None:
    cfg = MoeConfig(experts=4, top_k=2)
    scores_BTE = jax.nn.softmax(10.0 * jnp.asarray([[[1, 1, 0, 0], [0, 0, 1, 1]]] * 5, jnp.float32))
    routing = moe.choose(scores_BTE, None, jnp.ones((5, 2), bool), cfg)
    tally = moe.observe(jnp.log(scores_BTE), scores_BTE, routing, jnp.zeros(()), cfg)
    assert float(tally.balance) == pytest.approx(10, rel=1e-5)


def batch_of(rows: int) -> Batch:
    """Rows padded in front by different amounts, and loss weights that differ from row to row."""
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(61, size=(rows, T + 1)).astype(np.int32)
    positions_BT = np.arange(T) - rng.integers(T // 2, size=(rows, 1))
    weights_BT = (positions_BT >= rng.integers(1, T // 2, size=(rows, 1))).astype(np.float32)
    return Batch(
        tokens_BT[:, :-1],
        tokens_BT[:, 1:],
        weights_BT,
        np.arange(rows, dtype=np.int32),
        (positions_BT >= 0).astype(np.int32),
        np.maximum(positions_BT, -1).astype(np.int32),
    )


TRAINED = {
    "dropless": replace(LAYERS["sigmoid"], dropout=0.1),
    "capacity": replace(
        LAYERS["softmax"],
        moe=MoeConfig(experts=5, dispatch="capacity", capacity_factor=0.75, balance_weight=0.5, router_z_weight=0.1),
    ),
}


ADAMW = OptimizerConfig()


def state_of(cfg: ModelConfig, optimizer: OptimizerConfig = ADAMW) -> tuple[Any, TrainState]:
    model = decoder.build(cfg)
    params = jax.jit(lambda: initialize(model.spec, jax.random.key(0)))()
    opt_state = optimizers.build(optimizer, model.spec).init(params)
    return model, TrainState(params, opt_state, hyper(optimizer, steps=1000, seed=1), {}, zero_counters())


@pytest.mark.parametrize("name", TRAINED)
def test_accumulation_is_exact(name: str) -> None:
    """Losses, loads and drops of a batch are sums over its rows, so pieces of it add up to the whole."""
    model, state = state_of(TRAINED[name])
    objective, batch = language_model(model, LossConfig()), batch_of(6)

    def run(microbatches: int) -> Any:
        keys_B = sample_keys(jnp.uint32(0), batch.ids_B)
        return jax.jit(lambda state: accumulate(objective, state, {}, batch, keys_B, microbatches))(state)

    whole, pieces = run(1), run(3)
    assert_close(pieces, whole, 1e-6)
    load, tokens = whole[1]["load"]
    assert tokens == np.sum(batch.positions_BT >= 0)
    for load_LE in jax.tree.leaves(load):
        np.testing.assert_array_equal(load_LE.sum(axis=1), tokens * TRAINED[name].moe.top_k)
    if name == "capacity":
        assert 0.05 < finish({"dropped": whole[1]["dropped"]})["dropped"] < 0.95


@pytest.mark.parametrize("name", ["balance_loss", "router_z_loss"])
def test_the_gradient_is_that_of_the_named_losses(name: str) -> None:
    """The loss minimized is nll / its tokens + weight x auxiliary / its own tokens."""
    cfg = TRAINED["capacity"]
    model, state = state_of(cfg)
    batch = batch_of(4)
    keys_B = sample_keys(jnp.uint32(0), batch.ids_B)
    other = replace(cfg, moe=replace(cfg.moe, balance_weight=0.0, router_z_weight=0.0))
    alone = language_model(decoder.build(other), LossConfig())
    only = {"balance_loss": "router_z_weight", "router_z_loss": "balance_weight"}
    one = language_model(decoder.build(replace(cfg, moe=replace(cfg.moe, **{only[name]: 0.0}))), LossConfig())

    def auxiliary(params: Params) -> jax.Array:
        _, _, metrics = model.hidden(
            params,
            batch.tokens_BT,
            positions_BT=batch.positions_BT,
            segments_BT=batch.segments_BT,
            keys_B=keys_B,
        )
        total, weight = metrics[name]
        return model.auxiliary[name] * total / weight

    with_it, without = (jax.jit(lambda s, o=o: accumulate(o, s, {}, batch, keys_B, 1)[0])(state) for o in (one, alone))
    assert_close(jax.tree.map(jnp.subtract, with_it, without), jax.jit(jax.grad(auxiliary))(state.params), 1e-6)


# Training ---------------------------------------------------------------------------------------------------------


def test_the_bias_balances_a_skewed_router() -> None:
    cfg = replace(LAYERS["sigmoid"], moe=replace(LAYERS["sigmoid"].moe, balance_weight=0.0, bias_rate=0.02))
    settings = OptimizerConfig(name="sgd", learning_rate=1e-6)
    model, state = state_of(cfg, settings)
    layer = state.params["segments"]["0"]["0"]["moe"]
    layer["bias"] = jnp.tile(0.2 * jnp.arange(6), (2, 1))  # whatever the token, the last three
    step = jax.jit(make_step(language_model(model, LossConfig()), optimizers.build(settings, model.spec)))
    loads = []
    for _ in range(60):
        state, metrics = step(state, {}, batch_of(8))
        loads.append(finish(metrics)["max_load"])
    assert loads[0] > 1.9 and np.mean(loads[-20:]) < 1.4, loads
    steps_LE = np.asarray(state.params["segments"]["0"]["0"]["moe"]["bias"]) / 0.02
    np.testing.assert_allclose(steps_LE, np.round(steps_LE), atol=1e-3)  # moved by whole steps and by nothing else


QUICK = ("muon",)  # AdamW for routers' biases, its own rule for every expert's matrices


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in OPTIMIZERS]
)
def test_every_optimizer_trains_experts_and_leaves_biases_alone(name: str) -> None:
    cfg = replace(LAYERS["sigmoid"], moe=replace(LAYERS["sigmoid"].moe, bias_rate=0.0))
    settings = OptimizerConfig(name=name, learning_rate=1e-2)
    model, state = state_of(cfg, settings)
    bias_LE = state.params["segments"]["0"]["0"]["moe"]["bias"] = jnp.full((2, 6), 0.25)
    step = jax.jit(make_step(language_model(model, LossConfig()), optimizers.build(settings, model.spec)))
    before = by_path(state.params)
    for _ in range(2):
        state, metrics = step(state, {}, batch_of(6))
    after = by_path(state.params)
    np.testing.assert_array_equal(after["segments/0/0/moe/bias"], bias_LE)
    for path in ("router", "experts/up", "experts/down"):
        moved = np.asarray(before[f"segments/0/0/moe/{path}"] != after[f"segments/0/0/moe/{path}"])
        assert moved.reshape(2, -1).any(axis=1).all(), path
    assert finish(metrics).keys() >= {"balance_loss", "router_z_loss", "max_load", "loss"}


# Config -----------------------------------------------------------------------------------------------------------


def test_which_layers_are_mixtures() -> None:
    cfg = ModelConfig(
        **SIZES | {"layers": 9},
        pattern=("local", "local", "global"),
        window=4,
        moe=MoeConfig(experts=4, pattern=("dense", "moe"), dense_first=2),
    )
    kinds = [kind for period, repeats in cfg.segments for kind in period * repeats]
    assert tuple(kinds) == cfg.kinds
    assert [kind.mlp for kind in kinds] == ["dense", "dense", "dense"] + ["moe", "dense"] * 3
    assert [kind.attention for kind in kinds] == ["local", "local", "global"] * 3
    assert [(len(period), repeats) for period, repeats in cfg.segments] == [(2, 1), (6, 1), (1, 1)]
    spec = by_path(decoder.weights(cfg))
    assert spec["segments/1/1/moe/experts/up"].names == ("layers", "experts", "embed", "expert_mlp")
    assert "segments/1/0/mlp/up" in spec and "segments/1/0/moe/router" not in spec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 3}, "model.moe has settings but no experts"),
        ({"experts": 2, "top_k": 3}, r"model\.moe\.top_k=3 is more than model\.moe\.experts=2"),
        ({"experts": 2, "top_k": 1}, "from which no router learns"),
        ({"experts": 2, "pattern": ("dense",)}, "names no 'moe' layer"),
        ({"experts": 2, "pattern": ()}, "names no 'moe' layer"),
        ({"experts": 2, "dense_first": 2}, r"leaves all of model\.layers=2 dense"),
        ({"experts": 2, "shared_gate": True}, r"set model\.moe\.shared_mlp"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        ModelConfig(**SIZES, moe=MoeConfig(**settings))
