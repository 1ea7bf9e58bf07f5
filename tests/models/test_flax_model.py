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
from lmjax.models.flax_model import declare, from_linen, from_nnx
from lmjax.models.model import Model
from lmjax.optim import optimizers
from lmjax.optim.config import OptimizerConfig, ScheduleConfig, hyper
from lmjax.optim.muon import is_hidden_matrix
from lmjax.train.config import LossConfig
from lmjax.train.objective import language_model, scalar_arrays
from lmjax.train.state import TrainState, zero_counters
from lmjax.train.step import make_step
from lmjax.weights import Params, Weight, by_path, count, decays

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
    objective = language_model(model, LossConfig(chunk=4))
    step = jax.jit(make_step(objective, optimizer, microbatches=2))
    scalars = hyper(cfg, steps=30) | scalar_arrays(objective.scalars)
    state = TrainState(params, optimizer.init(params), scalars, zero_counters())
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


N, H = 2, 4
ATTENTION = {
    "query/kernel": ("matmul", (D,), (N, H)),
    "query/bias": ("bias", (), (N, H)),
    "out/kernel": ("matmul", (N, H), (D,)),
    "out/bias": ("bias", (), (D,)),
}


class LinenAttention(linen.Module):
    use_bias: bool

    @linen.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = linen.Embed(V, D, name="embed")(tokens_BT) + self.param("position_embed", linen.zeros, (1, 1, D))
        x_BTD = linen.MultiHeadDotProductAttention(N, name="mix", use_bias=self.use_bias)(x_BTD)
        return linen.Dense(V, name="embed_to_vocab")(linen.Dense(D, name="mlp")(x_BTD))


class NnxAttention(nnx.Module):
    def __init__(self, use_bias: bool, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.mix = nnx.MultiHeadAttention(N, D, decode=False, use_bias=use_bias, rngs=rngs)
        self.embed_to_vocab, self.mlp = nnx.Linear(D, V, rngs=rngs), nnx.Linear(D, D, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return self.embed_to_vocab(self.mlp(self.mix(self.embed(tokens_BT))))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_heads_biases_and_the_head_are_what_they_are(framework: str, use_bias: bool) -> None:
    """Decay leaves biases of any rank alone, Muon takes hidden matrices of any rank and not the head."""
    if framework == "linen":
        model, _ = from_linen(LinenAttention(use_bias), TOKENS_BT, jax.random.key(0))
    else:
        model, _ = from_nnx(NnxAttention(use_bias, nnx.Rngs(0)))
    spec = by_path(model.spec)
    for name, (kind, inputs, outputs) in ATTENTION.items():
        if use_bias or kind != "bias":
            weight = spec[f"mix/{name}"]
            sizes = dict(zip(weight.names, weight.shape, strict=True))
            found = tuple(tuple(sizes[axis] for axis in axes) for axes in (weight.in_axes, weight.out_axes))
            assert (weight.kind, *found) == (kind, inputs, outputs)
    assert not [path for path, weight in spec.items() if decays(weight) == path.endswith("bias")]
    hidden = {path for path, weight in spec.items() if is_hidden_matrix(weight)}
    assert hidden == {*(f"mix/{part}/kernel" for part in ("query", "key", "value", "out")), "mlp/kernel"}
    assert "vocab" in spec["embed_to_vocab/kernel"].out_axes
    tables = {path for path, weight in spec.items() if weight.kind == "lookup"}
    assert tables == {"embed/embedding", "position_embed"} & {*spec}
    assert not any(weight.tied for weight in spec.values())


def test_a_table_that_is_the_head_counts_as_one() -> None:
    class Tied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(V, D, rngs=rngs)

        def __call__(self, tokens_BT: jax.Array) -> jax.Array:
            return self.embed.attend(self.embed(tokens_BT))

    model, _ = from_nnx(Tied(nnx.Rngs(0)))
    assert count(model.spec).matmul == count(model.spec).total == V * D


def test_a_declaration_overrides_what_names_and_shapes_tell() -> None:
    params = {"mixer": jnp.ones((3, D, F)), "odd": {"kernel": jnp.ones((D, V))}, "tail": {"kernel": jnp.ones((D, V))}}
    both = by_path(declare(params, V))
    assert not any(is_hidden_matrix(both[path]) for path in ("odd/kernel", "tail/kernel")), "either may be the head"
    given = {
        "mixer": "mixers | embed -> wide",
        "odd/kernel": Weight("odd -> even"),
        "tail/kernel": Weight("-> a b", "bias"),
    }
    spec = by_path(declare(params, V, given))
    assert spec["mixer"].batch_axes == ("mixers",) and spec["mixer"].fan_in == D
    assert is_hidden_matrix(spec["odd/kernel"]) and not decays(spec["tail/kernel"])
    assert spec["mixer"].shape == (3, D, F)
    with pytest.raises(ValueError, match="declared names tale, which is no param; there are mixer, odd/kernel"):
        declare(params, V, {"tale": "-> a"})
    with pytest.raises(ValueError, match=r"declared\['mixer'\] has the axes 'a -> b', the param \(3, 8, 16\)"):
        declare(params, V, {"mixer": "a -> b"})


def test_what_a_module_would_ignore_is_refused() -> None:
    model, params, _ = linen_case()
    with pytest.raises(ValueError, match=r"not segments_BT; use data\.documents=joined"):
        model.hidden(params, TOKENS_BT, segments_BT=TOKENS_BT * 0, positions_BT=None)


def test_spec_axes_are_named_apart() -> None:
    model, _, _ = linen_case()
    for weight in by_path(model.spec).values():
        assert isinstance(weight, Weight)
        assert len(set(weight.names)) == len(weight.names) == len(weight.shape)
