"""Activations and their updates keep their size under muP, for every family and optimizer; with one entry of the table
wrong they do not."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
import pytest

from lmjax import parametrization
from lmjax.config import Config
from lmjax.coordinates import Sizes, Slopes, at_width, measure, slopes, table
from lmjax.data.config import DataConfig
from lmjax.models.config import BaseConfig, ModelConfig, MoeConfig
from lmjax.optim import rules
from lmjax.optim.config import OptimizerConfig
from lmjax.optim.muon import orthogonalize
from lmjax.optim.rules import OPTIMIZERS
from lmjax.optim.schedules import Hyper
from lmjax.parametrization import TABLE, Power
from lmjax.weights import Scaling, Spec, Weight, map_weights
from tests.conftest import FAMILIES

pytestmark = pytest.mark.usefixtures("quick_compilation")

replace = dataclasses.replace

BASE, WIDE = 64, 512  # the ends of what `lmjax coordinates` is asked for: what is small by chance fades in between
FEW, MANY = 8, 32  # seeds: where a few say that a site does not keep its size, many say whether that was chance
SIZES = {"vocab": 61, "context": 8, "layers": 1, "embed": BASE, "heads": 4, "head_dim": None, "mlp": 96}
EMBED_STD = {True: 0.005, False: 1.0}
"""Of a table that is the head, too, and of one that is not: random logits would hide what updates do to them, and a
table that updates change much hides what they do to all that follows."""
# Rates at which ten updates change activations by about as much as they are.
RATES = {"adafactor": 3e-3, "adamw": 3e-3, "lion": 2e-3, "muon": 1e-2, "sgd": 0.05}


MIXTURE_RATES = RATES | {"sgd": 7e-3}
BALANCE = dict.fromkeys(RATES, 0.0) | {"sgd": 10.0}
"""Weights of the balance loss. What moves a router else is random over the width at first, and the size of it is SGD's
step. The other optimizers step alike, and would soon have the balance: then a router moves as far as its start, which
shrinks, was off."""


def family(name: str, optimizer: str) -> ModelConfig:
    """One of the tests' families at the base width, with one period of its layers."""
    cfg = FAMILIES[name]
    layers = len(cfg.pattern) + cfg.moe.dense_first
    balance = {"mlp": 32, "balance_weight": BALANCE[optimizer], "shared_gate": False}
    moe = replace(cfg.moe, **balance) if cfg.moe.experts else cfg.moe
    sizes = SIZES | {"layers": layers, "kv_heads": None if cfg.kv_heads in (None, 4) else 2, "moe": moe}
    sizes |= {"embed_init_std": EMBED_STD[cfg.tied]}
    return parametrized(replace(cfg, **sizes, dropout=0.0, embed_dropout=0.0))


def parametrized(cfg: ModelConfig, name: str = "mup") -> ModelConfig:
    """With its own shape as the base."""
    dims = cfg.dims
    sizes = {"embed": cfg.embed, "layers": cfg.layers, "heads": cfg.heads, "mlp": cfg.mlp}
    sizes |= {"head_dim": dims["head_dim"], "kv_heads": dims["kv_heads"]}
    return replace(cfg, parametrization=name, base=BaseConfig(**sizes))


def run(model: ModelConfig, optimizer: str, seeds: int, **settings: Any) -> Sizes:
    """Without clipping, which would hide a gradient that is too large."""
    rate = (MIXTURE_RATES if model.moe.experts else RATES)[optimizer]
    settings = {"learning_rate": rate, "clip_norm": None, **settings}
    data = DataConfig(seq_len=model.context)
    return measure(Config(model=model, data=data, optimizer=OptimizerConfig(name=optimizer, **settings)), seeds=seeds)


@functools.cache
def at_base(model: ModelConfig, optimizer: str, seeds: int, settings: tuple[tuple[str, Any], ...]) -> Sizes:
    """At the base every factor is 1, whatever the table says."""
    return run(model, optimizer, seeds, **dict(settings))


def check(
    model: ModelConfig, optimizer: str, seeds: int = FEW, *, larger_heads: bool = False, **settings: Any
) -> list[Slopes]:
    wide = at_width(model, WIDE, larger_heads=larger_heads)
    measured = [at_base(model, optimizer, seeds, tuple(settings.items())), run(wide, optimizer, seeds, **settings)]
    return slopes((BASE, WIDE), measured)


def failing(found: list[Slopes]) -> list[Slopes]:
    return [one for one in found if not one.holds]


def assert_all_hold(model: ModelConfig, optimizer: str, but: str = "", **settings: Any) -> None:
    """`but` is a kind of sites that are left out."""
    for seeds in (FEW, MANY):
        found = [one for one in check(model, optimizer, seeds, **settings) if one.site.kind != but]
        if not failing(found):
            break
    assert len(found) > 12
    assert not failing(found), table(failing(found))


# The table holds --------------------------------------------------------------------------------------------------

QUICK = [("llama3", "adamw")]
ALL = [(name, optimizer) for name in FAMILIES for optimizer in OPTIMIZERS]


@pytest.mark.parametrize(
    ("name", "optimizer"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in ALL]
)
def test_every_site_keeps_its_size(name: str, optimizer: str) -> None:
    assert_all_hold(family(name, optimizer), optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_larger_heads_too(optimizer: str) -> None:
    """From scores so small that attention is as even at the base as it is where they have shrunk. What SGD changes of
    scores on purpose is less, at these widths, than what it changes by chance, which shrinks as the scores do."""
    even, but = parametrized(replace(STANDARD, attention_scale=0.05)), "product" if optimizer == "sgd" else ""
    assert_all_hold(even, optimizer, but, larger_heads=True, learning_rate=RATES[optimizer] / 3)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_under_the_standard_parametrization_updates_grow(optimizer: str) -> None:
    grows = [one for one in failing(check(STANDARD, optimizer)) if one.change > 0.2]
    assert grows or optimizer == "sgd"  # of which some shrink


# Mutants ----------------------------------------------------------------------------------------------------------

# Between them, every row: tables, biases and scales; matrices; a router; a head of its own.
STANDARD = ModelConfig(**SIZES, embed_init_std=EMBED_STD[False], tied=False, bias=True)
DENSE = parametrized(STANDARD)
TIED = parametrized(ModelConfig(**SIZES, embed_init_std=EMBED_STD[True]))
MIXTURE = parametrized(replace(STANDARD, moe=MoeConfig(experts=4, balance_weight=BALANCE["sgd"])))

Patch = Callable[[pytest.MonkeyPatch], None]


def wrong_entry(row: str, column: str, by: float) -> Patch:
    """One exponent of the table, of the sides that grow, off by half a power."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(TABLE[row], column)
        wrong = Power(right.grown_in + by, right.grown_out + by)
        if row == "hidden":  # whose sides grow alike
            wrong = Power(right.grown_in + by, right.grown_out)
        monkeypatch.setitem(TABLE, row, TABLE[row]._replace(**{column: wrong}))

    return patch


def wrong_logits(by: float) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(parametrization, "LOGITS", Power(-1 + by, -1 + by))


def wrong_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 / sqrt(head_dim) at every width."""
    monkeypatch.setattr(ModelConfig, "score_scale", property(lambda cfg: cfg.dims["head_dim"] ** -0.5))


def decay_at_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decay takes away multiplied by the weight's own rate, as all else is."""

    def decay(spec: Spec, hyper: Hyper) -> optax.GradientTransformation:
        def direction(weight: Weight, u: jax.Array, p: jax.Array) -> jax.Array:
            return weight.scaling.rate * (u + hyper["weight_decay"] * p)

        return optax.stateless(lambda updates, params: map_weights(direction, spec, updates, params))

    monkeypatch.setattr(rules, "decay", decay)


def unscaled_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard orthogonal step, at the parametrized rate."""
    monkeypatch.setattr(rules, "orthogonalize", lambda weight, u: orthogonalize(weight.scaled(Scaling()), u))


ENTRIES = {
    f"{row}.{column}{by:+}": (wrong_entry(row, column, by), MIXTURE if row == "output" else DENSE, "sgd", {})
    for row in TABLE
    for column in TABLE[row]._fields
    for by in (-0.5, 0.5)
}
MUTANTS: dict[str, tuple[Patch, ModelConfig, str, dict[str, Any]]] = ENTRIES | {
    "hidden.rate+0.5, adamw": (wrong_entry("hidden", "rate", 0.5), DENSE, "adamw", {}),
    "hidden.gradient-0.5, eps": (wrong_entry("hidden", "gradient", -0.5), DENSE, "adamw", {"eps": 1e-2}),
    "logits-0.5": (wrong_logits(-0.5), TIED, "sgd", {}),
    "logits+0.5": (wrong_logits(0.5), TIED, "sgd", {}),
    "scores": (wrong_scores, DENSE, "adamw", {"larger_heads": True}),
    "decay": (decay_at_the_rate, DENSE, "adamw", {"weight_decay": 30.0}),
    "muon": (unscaled_muon, DENSE, "muon", {}),
}
QUICK_MUTANTS = {"hidden.rate+0.5, adamw"}


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=() if m in QUICK_MUTANTS else pytest.mark.slow) for m in MUTANTS]
)
def test_one_wrong_entry_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, model, optimizer, settings = MUTANTS[name]
    patch(monkeypatch)
    assert failing(check(model, optimizer, **settings))
