"""What must hold for a mixture of experts beside what holds for every decoder."""

import dataclasses
import functools
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import Config, load
from lmjax.data.batch import Batch
from lmjax.errors import ConfigError
from lmjax.metrics import finish
from lmjax.models import decoder
from lmjax.models.config import ModelConfig, MoeConfig
from lmjax.models.linear import linear
from lmjax.models.mlp import mlp
from lmjax.models.model import Model
from lmjax.models.moe import moe, routing
from lmjax.optim import optimizers
from lmjax.optim.config import OptimizerConfig, hyper
from lmjax.optim.rules import OPTIMIZERS
from lmjax.record.checkpoint import Checkpoints
from lmjax.record.config import CheckpointConfig
from lmjax.run import assemble
from lmjax.tasks.pretrain import without_data
from lmjax.train.config import LossConfig
from lmjax.train.objective import Objective, language_model, scalar_arrays
from lmjax.train.state import TrainState, zero_counters
from lmjax.train.step import accumulate, make_step, sample_keys
from lmjax.weights import Params, bind, by_path, zeros
from tests.random_params import random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

replace = dataclasses.replace
B, T = 3, 16
SIZES = {"vocab": 61, "layers": 2, "embed": 12, "heads": 2, "mlp": 20}
TOLERANCE = 1e-5

LAYERS = {
    "softmax": ModelConfig(**SIZES, gated=True, moe=MoeConfig(experts=5, top_k=2)),
    "switch": ModelConfig(**SIZES, moe=MoeConfig(experts=4, top_k=1, normalize=False)),
    "sigmoid": ModelConfig(
        **SIZES,
        bias=True,
        moe=MoeConfig(experts=6, top_k=3, mlp=8, score="sigmoid", scale=2.5, shared_mlp=16, bias_rate=0.01),
    ),
    "shared": ModelConfig(**SIZES, gated=True, moe=MoeConfig(experts=4, shared_mlp=16, shared_gate=True)),
    "all": ModelConfig(**SIZES, moe=MoeConfig(experts=3, top_k=3)),
}


def slow_but(names: Iterable[str], quick: Set[str]) -> list[Any]:
    """Parameters of a test, slow ones but for a few."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def random_layer(cfg: ModelConfig) -> Params:
    return random_params(bind(moe.weights(cfg, zeros, zeros), cfg.dims), 0.3)


def random_input(cfg: ModelConfig, rows: int = B, length: int = T) -> tuple[jax.Array, jax.Array]:
    """Activations and which of them are real: one row is padded in front, another at its end."""
    x_BTD = jnp.asarray(np.random.default_rng(1).standard_normal((rows, length, cfg.embed)), jnp.float32)
    real_BT = np.ones((rows, length), bool)
    real_BT[0, :3] = real_BT[-1, -5:] = False
    return x_BTD, jnp.asarray(real_BT)


def dense_reference(p: Params, x_BTD: jax.Array, cfg: ModelConfig, kept_BTE: Any = True) -> jax.Array:
    """Every token through every expert; what was not chosen, or found no room, has weight zero."""
    logits_BTE = x_BTD @ p["router"]
    scores_BTE = jax.nn.softmax(logits_BTE) if cfg.moe.score == "softmax" else jax.nn.sigmoid(logits_BTE)
    ranked_BTE = scores_BTE + p.get("bias", 0.0)
    rank_BTE = jnp.sum(ranked_BTE[..., None, :] > ranked_BTE[..., :, None], axis=-1)
    weights_BTE = jnp.where(rank_BTE < cfg.moe.top_k, scores_BTE, 0.0)
    if cfg.moe.normalize:
        weights_BTE /= weights_BTE.sum(axis=-1, keepdims=True)
    weights_BTE = jnp.where(kept_BTE, weights_BTE, 0.0)
    y_BTD = jnp.zeros_like(x_BTD)
    for e in range(cfg.moe.experts):
        expert = {name: w[e] for name, w in p["experts"].items()}
        y_BTD += cfg.moe.scale * weights_BTE[..., e, None] * mlp(expert, x_BTD, cfg)
    if "shared" in p:
        gate_BT1 = jax.nn.sigmoid(linear(x_BTD, p["shared_gate"])) if cfg.moe.shared_gate else 1.0
        y_BTD += gate_BT1 * mlp(p["shared"], x_BTD, cfg)
    return y_BTD


def with_gradient(function: Any, p: Params, x_BTD: jax.Array, real_BT: Any = True) -> Any:
    """(output, gradients of a generic function of it with respect to weights and input), padding left out."""
    direction = jnp.asarray(np.random.default_rng(2).standard_normal(x_BTD.shape), jnp.float32)
    real_BT1 = jnp.broadcast_to(real_BT, x_BTD.shape[:2])[..., None]

    def scalar(p: Params, x_BTD: jax.Array) -> Any:
        y_BTD = jnp.where(real_BT1, function(p, x_BTD), 0.0)
        return jnp.sum(jnp.sin(y_BTD) * direction), y_BTD

    gradients, y_BTD = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(p, x_BTD)
    return y_BTD, gradients


def assert_close(got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1, float(jnp.max(jnp.abs(other)))))


# The layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(LAYERS, LAYERS.keys() - {"all"}))
def test_dispatch_equals_a_loop_over_experts(name: str) -> None:
    """With gradients; capacity too where there is room for everything: `capacity_factor` = experts / top_k."""
    cfg = LAYERS[name]
    p, (x_BTD, real_BT) = random_layer(cfg), random_input(cfg)
    want = with_gradient(lambda p, x_BTD: dense_reference(p, x_BTD, cfg), p, x_BTD, real_BT)
    for dispatch in moe.DISPATCHES:
        layer = replace(cfg.moe, dispatch=dispatch, capacity_factor=cfg.moe.experts / cfg.moe.top_k)
        got = with_gradient(mixture_of(replace(cfg, moe=layer), real_BT), p, x_BTD, real_BT)
        assert_close(got, want)


def mixture_of(cfg: ModelConfig, real_BT: jax.Array) -> Any:
    return lambda p, x_BTD: moe.mixture(p, x_BTD, real_BT, cfg, training=True)[0]


def test_a_tie_goes_to_the_expert_of_lower_index() -> None:
    scores_BTE = jnp.asarray([[[0.1, 0.4, 0.4, 0.1], [0.25, 0.25, 0.25, 0.25]]])
    chosen = routing.choose(scores_BTE, None, jnp.ones((1, 2), bool), MoeConfig(experts=4, top_k=3))
    assert chosen.chosen_BTX.tolist() == [[[1, 2, 0], [0, 1, 2]]]
    np.testing.assert_allclose(chosen.weights_BTX, [[[4 / 9, 4 / 9, 1 / 9], [1 / 3, 1 / 3, 1 / 3]]], rtol=1e-6)


def test_a_bias_moves_the_choice_and_not_the_weights() -> None:
    scores_BTE = jnp.asarray([[[0.5, 0.3, 0.2]]])
    chosen = routing.choose(
        scores_BTE, jnp.asarray([-1.0, 0.0, 0.5]), jnp.ones((1, 1), bool), MoeConfig(experts=3, top_k=2)
    )
    assert chosen.chosen_BTX.tolist() == [[[2, 1]]]
    np.testing.assert_allclose(chosen.weights_BTX, [[[0.4, 0.6]]], rtol=1e-6)


# Capacity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sigmoid", "shared"])
def test_capacity_equals_a_loop_over_tokens(name: str) -> None:
    """Experts fill up token by token, a token's choices by their scores; then as the loop over experts."""
    cfg = replace(LAYERS[name], moe=replace(LAYERS[name].moe, dispatch="capacity", capacity_factor=0.75))
    p, (x_BTD, real_BT) = random_layer(cfg), random_input(cfg)
    scores_BTE = routing.score(x_BTD @ p["router"], cfg.moe)
    chosen_BTX = np.argsort(-(scores_BTE + p.get("bias", 0.0)), axis=-1)[..., : cfg.moe.top_k]
    kept_BTE = served(chosen_BTX, np.asarray(real_BT), cfg.moe)
    assert 0.1 < 1 - kept_BTE.sum() / (real_BT.sum() * cfg.moe.top_k) < 0.5
    got = with_gradient(mixture_of(cfg, real_BT), p, x_BTD, real_BT)
    assert_close(got, with_gradient(lambda p, x_BTD: dense_reference(p, x_BTD, cfg, kept_BTE), p, x_BTD, real_BT))


def served(chosen_BTX: np.ndarray, real_BT: np.ndarray, cfg: MoeConfig) -> np.ndarray:
    """kept_BTE, which choices find room when real tokens ask in their order."""
    kept_BTE = np.zeros((*real_BT.shape, cfg.experts), bool)
    for b, t in np.argwhere(real_BT):
        for e in chosen_BTX[b, t]:
            kept_BTE[b, t, e] = kept_BTE[b, :, e].sum() < moe.room(real_BT.shape[1], cfg)
    return kept_BTE


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
    y_BTD, tally = jax.jit(lambda: moe.mixture(p, x_BTD, real_BT, cfg, training=True))()
    assert np.any(y_BTD != 0, axis=-1).tolist() == [[False, True, True, False, False, False, False, False]]
    assert float(tally.dropped) == 4
    assert tally.load_E.tolist() == [0, 0, 6, 0]
    text_BT = real_BT & (jnp.arange(8) >= 2)  # what is in front of the text takes a place all the same
    tally = jax.jit(lambda: moe.mixture(p, x_BTD, real_BT, cfg, training=True, text_BT=text_BT))()[1]
    assert float(tally.dropped) == 4 and tally.load_E.tolist() == [0, 0, 5, 0]
    y_BTD, tally = jax.jit(lambda: moe.mixture(p, x_BTD, real_BT, cfg, training=False))()
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
        changed_BTD = np.array(x_BTD)
        changed_BTD[:, t:] = np.flip(changed_BTD[:, t:], axis=(1, 2))
        np.testing.assert_array_equal(np.asarray(forward(changed_BTD)[0])[:, :t], np.asarray(y_BTD)[:, :t])


# Losses, and what is exact ----------------------------------------------------------------------------------------


def test_balance_and_z_losses_by_hand() -> None:
    """Two tokens of three are real; E = 2, one choice: f = (1, 0) x 2, P = mean of the real tokens."""
    cfg = MoeConfig(experts=2, top_k=1, normalize=False)
    logits_BTE = jnp.log(jnp.asarray([[[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]]) * 3)
    real_BT = jnp.asarray([[True, True, False]])
    scores_BTE = routing.score(logits_BTE, cfg)
    tally = jax.jit(
        lambda: routing.observe(logits_BTE, scores_BTE, routing.choose(scores_BTE, None, real_BT, cfg), 0.0, cfg)
    )()
    assert tally.load_E.tolist() == [2, 0]
    assert float(tally.balance) == pytest.approx(2 * (2 * 0.7), rel=1e-6)
    assert float(tally.router_z) == pytest.approx(2 * np.log(3) ** 2, rel=1e-6)


def test_what_is_in_front_of_a_text_is_not_counted() -> None:
    """Losses and loads are those of the text alone."""
    cfg = LAYERS["softmax"]
    p, (x_BTD, real_BT) = random_layer(cfg), random_input(cfg)
    text_BT = real_BT & (jnp.arange(T) >= 6)

    def tallies() -> list[routing.Tally]:
        whole = moe.mixture(p, x_BTD, real_BT, cfg, training=True, text_BT=text_BT)[1]
        return [whole, moe.mixture(p, x_BTD[:, 6:], real_BT[:, 6:], cfg, training=True)[1]]

    assert_close(*jax.jit(tallies)())


def test_perfect_balance_has_the_loss_one() -> None:
    cfg = MoeConfig(experts=4, top_k=2)
    scores_BTE = jax.nn.softmax(10.0 * jnp.asarray([[[1, 1, 0, 0], [0, 0, 1, 1]]] * 5, jnp.float32))
    chosen = routing.choose(scores_BTE, None, jnp.ones((5, 2), bool), cfg)
    tally = jax.jit(lambda: routing.observe(jnp.log(scores_BTE), scores_BTE, chosen, 0.0, cfg))()
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


PLAIN = ModelConfig(**SIZES, position="none")  # what is not about mixtures only costs compilation
SIGMOID = MoeConfig(experts=6, top_k=3, mlp=8, score="sigmoid", scale=2.5)
TRAINED = {
    "dropless": replace(PLAIN, dropout=0.1, moe=SIGMOID),
    "capacity": replace(
        PLAIN,
        dropout=0.1,
        moe=MoeConfig(experts=5, dispatch="capacity", capacity_factor=0.75, balance_weight=0.5, router_z_weight=0.1),
    ),
}


class Setup(NamedTuple):
    objective: Objective
    state: TrainState
    batch: Batch
    keys_B: jax.Array

    def accumulated(self, microbatches: int) -> Any:
        """Gradient and metrics of the batch."""

        def run(params: Params) -> Any:
            state = dataclasses.replace(self.state, params=params)
            return accumulate(self.objective, state, {}, self.batch, self.keys_B, microbatches)

        return jax.jit(run)(self.state.params)


@functools.cache
def setup(name: str) -> Setup:
    model = decoder.build(TRAINED[name])
    batch = batch_of(6)
    state = initial_state(model, OptimizerConfig())
    return Setup(language_model(model, LossConfig()), state, batch, sample_keys(jnp.uint32(0), batch.ids_B))


def initial_state(model: Model, settings: OptimizerConfig, bias_LE: Any = None) -> TrainState:
    params = random_params(model.spec, 0.3)
    if bias_LE is not None:
        layer_of(params)["bias"] = jnp.asarray(bias_LE, jnp.float32)
    opt_state = optimizers.build(settings, model.spec).init(params)
    scalars = hyper(settings, steps=1000, seed=1) | scalar_arrays(language_model(model, LossConfig()).scalars)
    state = TrainState(params, opt_state, scalars, zero_counters())
    return jax.device_put(state, jax.devices()[0])  # as a restored state lies: one compilation serves both


def layer_of(params: Params) -> Params:
    return params["segments"]["0"]["0"]["moe"]


@functools.cache
def gradient_of_a_batch(name: str) -> Any:
    return setup(name).accumulated(1)


@pytest.mark.parametrize("name", slow_but(TRAINED, {"capacity"}))
def test_accumulation_is_exact(name: str) -> None:
    """Losses, loads and drops of a batch are sums over its rows, so pieces of it add up to the whole."""
    whole, pieces = gradient_of_a_batch(name), setup(name).accumulated(3)
    assert_close(pieces, whole, 1e-6)
    load, tokens = whole[1]["load"]
    assert tokens == np.sum(setup(name).batch.positions_BT >= 0)
    for load_LE in jax.tree.leaves(load):
        np.testing.assert_array_equal(load_LE.sum(axis=1), tokens * TRAINED[name].moe.top_k)
    if name == "capacity":
        assert 0.05 < finish({"dropped": whole[1]["dropped"]})["dropped"] < 0.95


def test_the_gradient_is_that_of_the_named_losses() -> None:
    """What is minimized is nll / its tokens + each weight x auxiliary / its own tokens."""
    objective, state, batch, keys_B = setup("capacity")
    layer = TRAINED["capacity"].moe

    def minimized(params: Params) -> jax.Array:
        _, metrics = objective.loss(params, {}, batch, keys_B, state.hyper)
        mean = {name: total / weight for name, (total, weight) in metrics.items() if name != "load"}
        auxiliary = layer.balance_weight * mean["balance_loss"] + layer.router_z_weight * mean["router_z_loss"]
        return mean["loss"] + auxiliary

    gradient, metrics = gradient_of_a_batch("capacity")
    assert float(metrics["loss"][1]) != float(metrics["balance_loss"][1])
    assert_close(gradient, jax.jit(jax.grad(minimized))(state.params), 1e-6)


# Training ---------------------------------------------------------------------------------------------------------

BIAS_RATE = 0.03


@functools.cache
def training(name: str) -> Any:
    """(model, step) of a model whose experts have biases; the learning rate is not compiled in."""
    model = decoder.build(replace(PLAIN, moe=replace(SIGMOID, balance_weight=0.0, bias_rate=BIAS_RATE)))
    optimizer = optimizers.build(OptimizerConfig(name=name), model.spec)
    return model, jax.jit(make_step(language_model(model, LossConfig()), optimizer))


def test_the_bias_balances_a_skewed_router() -> None:
    model, step = training("muon")
    skewed_LE = np.tile(0.2 * np.arange(6), (2, 1))  # whatever the token, the last three
    state = initial_state(model, OptimizerConfig(name="muon", learning_rate=1e-6), skewed_LE)
    loads = []
    for _ in range(40):
        state, metrics = step(state, {}, batch_of(6))
        loads.append(finish(metrics)["max_load"])
    assert loads[0] > 1.9 and np.mean(loads[-8:]) < 1.4, loads


def test_training_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    """Of the biases too, which no gradient moves."""
    model, step = training("muon")
    states = [initial_state(model, OptimizerConfig(name="muon", learning_rate=1e-2))]
    for _ in range(4):
        states.append(step(states[-1], {}, batch_of(6))[0])
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(2, states[2], {})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states[2])
    resumed, _, _ = checkpoints.restore(shapes)
    for _ in range(2):
        resumed, _ = step(resumed, {}, batch_of(6))
    jax.tree.map(np.testing.assert_array_equal, resumed, states[4])
    assert np.any(layer_of(states[4].params)["bias"] != layer_of(states[2].params)["bias"])


# Muon in the quick tests: it has a rule of its own for every expert's matrices.
@pytest.mark.parametrize("name", slow_but(OPTIMIZERS, {"muon"}))
def test_every_optimizer_trains_experts_and_leaves_biases_alone(name: str) -> None:
    """Biases move by whole steps of their own rate and by nothing else, weight decay included."""
    model, step = training(name)
    state = initial_state(
        model, OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=0.1), np.full((2, 6), 0.25)
    )
    before = by_path(layer_of(state.params))
    for _ in range(2):
        state, metrics = step(state, {}, batch_of(6))
    after = by_path(layer_of(state.params))
    steps_LE = (np.asarray(after["bias"]) - 0.25) / BIAS_RATE
    np.testing.assert_allclose(steps_LE, np.round(steps_LE), atol=1e-3)
    assert np.abs(steps_LE).max() > 0.5
    for path in ("router", "experts/up", "experts/down"):
        moved = np.asarray(before[path] != after[path])
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
    assert [kind.mixer for kind in kinds] == ["local", "local", "global"] * 3
    assert [(len(period), repeats) for period, repeats in cfg.segments] == [(2, 1), (6, 1), (1, 1)]
    spec = by_path(decoder.weights(cfg))
    assert spec["segments/1/1/moe/experts/up"].names == ("layers", "experts", "embed", "expert_mlp")
    assert "segments/1/0/mlp/up" in spec and "segments/1/0/moe/router" not in spec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 3}, "model.moe has settings but no experts"),
        ({"experts": 2, "top_k": 3}, r"model\.moe\.top_k=3 is more than model\.moe\.experts=2"),
        ({"experts": 2, "pattern": ("dense",)}, "names no 'moe' layer"),
        ({"experts": 2, "pattern": ()}, "names no 'moe' layer"),
        ({"experts": 2, "dense_first": 2}, r"leaves all of model\.layers=2 dense"),
        ({"experts": 2, "shared_gate": True}, r"set model\.moe\.shared_mlp"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        ModelConfig(**SIZES, moe=MoeConfig(**settings))


def test_a_router_that_cannot_learn_is_refused_for_training_alone(tmp_path: Path) -> None:
    cfg = ModelConfig(**SIZES, moe=MoeConfig(experts=2, top_k=1))
    decoder.build(cfg)
    with pytest.raises(ConfigError, match="from which no router learns"):
        assemble.assemble(without_data(Config(model=cfg)))
    (tmp_path / "one.py").write_text("from lmjax.config import default_config as get_config\n")
    overrides = ["model.moe.experts=2", "model.moe.top_k=1"]
    with pytest.raises(ConfigError, match="from which no router learns"):
        load(f"{tmp_path}/one.py", overrides)
    load(f"{tmp_path}/one.py", [*overrides, "model.moe.normalize=False"])
