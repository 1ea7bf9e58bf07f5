"""What follows from a weight's declaration when a model grows: factors, refusals, and nothing at the base shape."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import Config, load
from lmjax.data.config import DataConfig
from lmjax.errors import ConfigError
from lmjax.hf.families import family_for
from lmjax.models import decoder
from lmjax.models.config import BaseConfig, ModelConfig, MoeConfig
from lmjax.optim import optimizers
from lmjax.optim.config import OptimizerConfig, ScheduleConfig, hyper
from lmjax.optim.rules import OPTIMIZERS
from lmjax.parametrization import PARAMETRIZATIONS, check_scaled, parametrize, stream_factor
from lmjax.run import assemble
from lmjax.tasks.pretrain import without_data
from lmjax.train.config import TrainConfig
from lmjax.weights import Params, Scaling, Weight, abstract, bind, by_path, stacked
from tests.conftest import FAMILIES

pytestmark = pytest.mark.usefixtures("quick_compilation")

replace = dataclasses.replace
PARAMETRIZED = [name for name, depth in PARAMETRIZATIONS.items() if depth is not None]
LARGE = ModelConfig(vocab=61, context=16, layers=8, embed=64, heads=8, kv_heads=4, mlp=128, gated=True)


def at_base(cfg: ModelConfig, name: str) -> ModelConfig:
    """Parametrized, with the model's own shape as its base."""
    return replace(cfg, parametrization=name, base=BaseConfig(embed=cfg.embed, layers=cfg.layers))


def grown(cfg: ModelConfig = LARGE, name: str = "mup", **base: int) -> ModelConfig:
    return replace(cfg, parametrization=name, base=BaseConfig(**{"embed": 16, "layers": 2, **base}))


# At the base shape ------------------------------------------------------------------------------------------------


def program(model: ModelConfig, optimizer: str) -> str:
    """The train step's, as it is handed to XLA."""
    cfg = Config(
        model=model, data=DataConfig(seq_len=8), train=TrainConfig(batch=2), optimizer=OptimizerConfig(name=optimizer)
    )
    experiment = assemble.assemble(without_data(cfg))
    arguments = assemble.abstract_state(experiment), {}, assemble.abstract_batch(experiment)
    return assemble.jitted_step(experiment).lower(*arguments).as_text()


QUICK = [("mixtral", "muon"), ("gpt2", "sgd")]
ALL = [(family, optimizer) for family in FAMILIES for optimizer in OPTIMIZERS]
PROGRAMS = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in ALL]


@pytest.mark.parametrize(("family", "optimizer"), PROGRAMS)
def test_at_the_base_shape_every_parametrization_is_the_standard_program(family: str, optimizer: str) -> None:
    """So it trains to the same bits: where a factor is 1 nothing is multiplied."""
    model = FAMILIES[family]
    for name in PARAMETRIZED:
        assert program(at_base(model, name), optimizer) == program(model, optimizer)


def test_at_the_base_shape_weights_start_with_the_same_bits(cfg: ModelConfig) -> None:
    programs = set()
    for one in (cfg, *(at_base(cfg, name) for name in PARAMETRIZED)):
        start = functools.partial(decoder.start, cfg=one)
        programs.add(str(jax.make_jaxpr(start)(jax.random.key(0), decoder.config_scalars(one))))
        assert decoder.config_scalars(one) == decoder.config_scalars(cfg)
    assert len(programs) == 1


def test_away_from_it_programs_differ() -> None:
    assert len({program(grown(name=name), "adamw") for name in PARAMETRIZED} | {program(LARGE, "adamw")}) == 3


# Factors ----------------------------------------------------------------------------------------------------------


def scalings(cfg: ModelConfig) -> dict[str, Scaling]:
    return {path: weight.scaling for path, weight in by_path(decoder.weights(cfg)).items()}


def test_every_weight_of_every_family_has_a_rule(cfg: ModelConfig) -> None:
    spec = decoder.weights(at_base(cfg, "mup"))
    check_scaled("mup", spec)
    kinds = {path: weight.scaling.kind for path, weight in by_path(spec).items()}
    assert {path for path, kind in kinds.items() if kind is None} == {
        path for path, weight in by_path(spec).items() if weight.kind == "buffer"
    }


def test_rows_of_the_table() -> None:
    """A router does not grow with the model: it is an output, but no readout."""
    moe = MoeConfig(experts=4, shared_mlp=64, shared_gate=True)
    found = scalings(grown(replace(LARGE, moe=moe, tied=False, bias=True, position="learned")))
    layer = "segments/0/0"
    outputs = {f"{layer}/moe/router", f"{layer}/moe/shared_gate"}
    assert {path for path, scaling in found.items() if scaling.kind == "output"} == outputs
    assert {path for path, scaling in found.items() if scaling.kind == "readout"} == {"unembed"}
    hidden = {path.split("/")[-1] for path, scaling in found.items() if scaling.kind == "hidden"}
    assert hidden == {"query", "key", "value", "output", "up", "gate", "down"}
    assert found[f"{layer}/moe/experts/down"] == Scaling("hidden", 4, 4, 0.5, 4 * 2, 1 / 4 / 2, 1)
    assert found["embed"] == found["position"] == Scaling("input", 1, 4, 1, 4, 1, 1)
    assert found["unembed"] == Scaling("readout", 4, 1, 1, 4, 1, 1 / 4)
    assert found[f"{layer}/moe/router"] == Scaling("output", 4, 1, 1 / 4, 2, 1 / 4 / 2, 1)


def test_a_tied_table_obeys_both_of_its_rules() -> None:
    tied, apart = scalings(grown()), scalings(grown(replace(LARGE, tied=False)))
    for column in ("std", "gradient", "rate"):
        assert getattr(tied["embed"], column) == getattr(apart["embed"], column) == getattr(apart["unembed"], column)
    assert tied["embed"].logits == apart["unembed"].logits == 1 / 4


@pytest.mark.parametrize(("name", "exponent"), [("mup", 0.5), ("completep", 1.0)])
def test_depth(name: str, exponent: float) -> None:
    """A layer's weights move by as much less as there are more of them, over what the stream takes of each."""
    found = scalings(grown(name=name, embed=64))
    assert stream_factor(name, 4) == 4**-exponent
    assert found["segments/0/0/mlp/up"] == Scaling("input", 1, 1, 1, 4**exponent, 4 ** (exponent - 1), 1)
    assert found["embed"] == Scaling("readout")
    assert grown(name=name, embed=64).residual_scale == grown(name=name).residual_scale == (2 * 2) ** -0.5


def test_attention_scores_shrink_with_the_head_size_alone() -> None:
    assert grown().score_scale == 8**-0.5
    assert grown(heads=8).score_scale == 2**-0.5 / 4  # heads of 2 grew to 8
    assert grown(replace(LARGE, attention_scale=0.3), heads=8).score_scale == 0.3 / 4


@pytest.mark.parametrize("init_std", [None, 0.3])
def test_initial_spreads(init_std: float | None) -> None:
    """Whether a matrix starts by its fan-in or by a number, at the base shape it is the same as without."""
    cfg = grown(replace(LARGE, layers=1, init_std=init_std, tied=False, embed_init_std=0.7))
    params = by_path(jax.jit(lambda: decoder.start(jax.random.key(0), decoder.config_scalars(cfg), cfg=cfg))())
    hidden, readout = (init_std / 2, init_std) if init_std else (64**-0.5, 16**-0.5)
    stds = {"segments/0/0/mlp/up": hidden, "unembed": readout, "embed": 0.7}
    for path, std in stds.items():
        assert float(jnp.std(params[path])) == pytest.approx(std, rel=0.05)


# Updates ----------------------------------------------------------------------------------------------------------

DIMS, GROWTH = (
    {"vocab": 8, "routes": 4, "embed": 32, "mlp": 64},
    {"vocab": 1.0, "routes": 1.0, "embed": 4.0, "mlp": 2.0},
)
DECLARED = {
    "embed": Weight("vocab -> embed", kind="lookup"),
    "unembed": Weight("embed -> vocab"),
    "layers": {"up": Weight("embed -> mlp"), "router": Weight("embed -> routes"), "norm": Weight("-> embed", "scale")},
}
DEEP = 9.0


@functools.cache
def specs() -> tuple[dict, dict]:
    """(standard, parametrized)"""
    spec = bind({name: DECLARED[name] for name in ("embed", "unembed")}, DIMS)
    spec["layers"] = stacked(bind(DECLARED["layers"], DIMS), 2)
    return spec, parametrize("mup", spec, GROWTH, DEEP)


def updates(spec: dict, name: str, scale: float = 1.0, **settings: float) -> dict[str, np.ndarray]:
    """The first, from random gradients times `scale`."""
    cfg = OptimizerConfig(name=name, clip_norm=None, schedule=ScheduleConfig(name="constant", warmup=0), **settings)
    optimizer, rng = optimizers.build(cfg, spec), np.random.default_rng(0)
    params, grads = (jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), abstract(spec)) for _ in range(2))
    grads = jax.tree.map(lambda g: scale * g, grads)

    def first(params: Params, grads: Params) -> Params:
        state, scalars = optimizer.init(params), hyper(cfg, steps=10)
        return optimizer.update(grads, state, params, scalars, jnp.int32(0), jnp.float32(1))[0]

    return by_path(jax.jit(first)(params, grads))


# Over the standard update: Yang et al. 2022, table 8, with layers as in Yang et al. 2023.
ADAM = {"embed": 1, "unembed": 1, "layers/up": 1 / 4 / 3, "layers/router": 1 / 4 / 3, "layers/norm": 1 / 3}
SGD = {"embed": 4, "unembed": 4, "layers/up": 2 / 4, "layers/router": 1 / 4, "layers/norm": 4}
# Orthogonal steps have a spectral norm that grows as sqrt(largest side): the rule undoes that, and makes it
# sqrt(grown out / grown in), the base's sides being 8 x 32 of `up` and 8 x 4 of the router.
MUON = ADAM | {
    "layers/up": (2 / 4) ** 0.5 * (32 / 64) ** 0.5 / 3,
    "layers/router": (1 / 4) ** 0.5 * (8 / 32) ** 0.5 / 3,
}
FACTORS = {"adamw": ADAM, "lion": ADAM, "adafactor": ADAM, "sgd": SGD, "muon": MUON}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_the_tables(name: str) -> None:
    standard, scaled = (updates(spec, name, weight_decay=0.0) for spec in specs())
    for path, factor in FACTORS[name].items():
        np.testing.assert_allclose(scaled[path], factor * standard[path], rtol=1e-4, atol=1e-8, err_msg=path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_takes_away_the_same_at_every_width(name: str) -> None:
    standard, scaled = (
        jax.tree.map(np.subtract, updates(spec, name, weight_decay=0.5), updates(spec, name, weight_decay=0.0))
        for spec in specs()
    )
    for path, taken in standard.items():
        np.testing.assert_allclose(scaled[path], taken, atol=1e-6, err_msg=path)
        assert path == "layers/norm" or np.abs(taken).max() > 1e-4


def test_adams_epsilon_is_compared_with_a_gradient_of_the_base_shapes_size() -> None:
    """Of `up` an entry shrinks as 1 / what comes out, and in depth as the stream's factor."""
    at_base = updates(specs()[0], "adamw", weight_decay=0.0, eps=1.0)
    wide = updates(specs()[1], "adamw", weight_decay=0.0, eps=1.0, scale=1 / 2 / 3)
    np.testing.assert_allclose(wide["layers/up"], at_base["layers/up"] / 4 / 3, rtol=1e-5)


# Refusals ---------------------------------------------------------------------------------------------------------


def test_a_weight_without_a_rule_is_refused() -> None:
    for weight in (Weight("embed -> vocab", kind="lookup"), Weight("embed -> mlp", kind="bias")):
        spec = {"outer": {"odd": bind({"one": weight}, DIMS)["one"]}}
        with pytest.raises(ConfigError, match=r"no rule for 'outer/odd' \((lookup|bias), embed ->"):
            parametrize("mup", spec, GROWTH, 1.0)
        assert parametrize("standard", spec, GROWTH, 1.0) is spec


def test_what_does_not_parametrize_its_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture, a Flax module, an adapter: none trains at the standard rates when others were asked for."""
    task = without_data(Config(model=grown()))
    assemble.assemble(task)
    other = task._replace(spec={**task.spec, "adapter": bind({"one": Weight("embed -> mlp")}, DIMS)})
    with pytest.raises(ConfigError, match=r"parametrization=mup says nothing of 'adapter/one' \(embed -> mlp\)"):
        assemble.assemble(other)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"parametrization": "mup"}, "set model.base.embed and model.base.layers"),
        ({"parametrization": "mup", "base": BaseConfig(embed=16)}, "set model.base.embed and model.base.layers"),
        ({"base": BaseConfig(embed=16)}, "model.base is read by a parametrization"),
        ({"parametrization": "mup", "base": BaseConfig(embed=24, layers=2)}, "model.base: heads would be 1.5"),
        ({"parametrization": "mup", "base": BaseConfig(embed=16, layers=2, heads=3)}, "head_dim would be 5.33"),
        ({"parametrization": "mup", "base": BaseConfig(embed=16, layers=2, head_dim=8)}, "kv_heads would be 0.5"),
        ({"parametrization": "mup", "base": BaseConfig(embed=16, layers=2, head_dim=3, heads=4)}, "must be even"),
        ({"parametrization": "mupp"}, "did you mean 'mup'"),
    ],
)
def test_bases_that_cannot_be_are_refused(settings: dict, says: str) -> None:
    cfg = {"vocab": 61, "embed": 64, "heads": 4, "kv_heads": 1, "mlp": 128, "layers": 4}
    with pytest.raises(ValueError, match=says):
        ModelConfig(**{**cfg, **settings})


def test_hugging_faces_configs_have_no_field_for_it() -> None:
    family_for(LARGE)
    with pytest.raises(ConfigError, match=r"model\.parametrization=mup multiplies logits"):
        family_for(grown())


def test_a_rule_that_follows_size_as_well_is_told(caplog: pytest.LogCaptureFixture) -> None:
    settings = ["hyperparameters=nanochat", "optimizer.learning_rate=0.001"]
    quickstart = str(Path(__file__).parent.parent / "configs" / "quickstart.py")
    load(quickstart, settings)
    assert "does so again" not in caplog.text
    load(quickstart, [*settings, "model.parametrization=mup", "model.base.embed=64", "model.base.layers=2"])
    assert "model.parametrization=mup does so again" in caplog.text


def test_the_base_shape_is_in_proportion() -> None:
    moe = MoeConfig(experts=4, mlp=32, shared_mlp=64)
    base = grown(replace(LARGE, moe=moe, kv_heads=1), kv_heads=1).base_shape
    assert (base.embed, base.layers, base.heads, base.dims["kv_heads"], base.head_dim) == (16, 2, 2, 1, 8)
    assert (base.mlp, base.moe.mlp, base.moe.shared_mlp, base.parametrization) == (32, 8, 16, "standard")
    assert grown(mlp=128).growth["mlp"] == 1


def test_parametrizations_are_chosen_by_name() -> None:
    for name in PARAMETRIZED:
        assert grown(name=name).parametrization == name
    assert ModelConfig().parametrization == "standard" and stream_factor("standard", 7.0) == 1
