"""A new head, or tables for another tokenizer, are drawn anew; the rest is taken, to the bit."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from lmjax.config import Config
from lmjax.data.config import DataConfig
from lmjax.errors import ConfigError
from lmjax.hf.imported import Imported
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.run.convert import write_workdir
from lmjax.tasks.start import model_of
from lmjax.train.config import TrainConfig, TuneConfig
from lmjax.weights import Params, by_path
from tests.finetune.peft_fixtures import FIXTURES
from tests.finetune.test_parts import config

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Params]:
    """A run of the llama3 family with 61 tokens, and its weights."""
    cfg = config("llama3")
    params = assemble.initial_state(assemble.assemble(without_data(cfg))).params
    path = tmp_path_factory.mktemp("fresh") / "base"
    write_workdir(Imported(cfg.model, params, None, {}), epath.Path(path), source="a test")
    return str(path), params


def start(cfg: Any) -> dict[str, Any]:
    """All weights that a run begins with."""
    experiment = assemble.assemble(without_data(cfg))
    state, frozen = assemble.initial_state(experiment), assemble.frozen_params(experiment)
    language = experiment.task.language
    assert language is not None
    return by_path(language.weights(frozen, state.params))


TABLES = ("* -> vocab", "vocab -> *")


@pytest.mark.parametrize(
    ("tune", "sizes", "fresh"),
    [
        ({"fresh": ("unembed",)}, {}, {"unembed"}),
        ({"fresh": TABLES, "train": ("unembed",)}, {"vocab": 40}, {"unembed", "embed"}),
    ],
)
def test_what_is_named_is_drawn_and_the_rest_is_taken(
    base: tuple[str, Params], tune: dict[str, Any], sizes: dict[str, Any], fresh: set[str]
) -> None:
    path, params = base
    named = {f"model__{name}": size for name, size in sizes.items()}
    cfg = config("llama3", tune=tune, train__init_from=path, train__seed=3, **named)
    drawn_ones = start(config("llama3", train__seed=3, **named))
    for name, w in start(cfg).items():
        np.testing.assert_array_equal(w, drawn_ones[name] if name in fresh else by_path(params)[name], err_msg=name)


def test_a_hugging_face_model_is_taken_for_another_vocabulary() -> None:
    base = FIXTURES / "llama" / "base"
    model, train = model_of(str(base)), TrainConfig(init_from=str(base), batch=2)
    taken = start(Config(model=model, train=train))
    found = start(Config(model=dataclasses.replace(model, vocab=30), train=train, tune=TuneConfig(fresh=TABLES)))
    assert found["embed"].shape[0] == 30 and taken["embed"].shape[0] == 19
    inner = [name for name in taken if name not in ("embed", "unembed")]
    jax.tree.map(np.testing.assert_array_equal, {n: taken[n] for n in inner}, {n: found[n] for n in inner})


@pytest.mark.parametrize(
    ("sizes", "fresh"),
    [({"tied": False}, "unembed"), ({"context": 48}, "position")],
    ids=["a head beside a table that was the head", "a longer table of positions"],
)
def test_a_hugging_face_model_need_not_have_what_is_drawn(sizes: dict[str, Any], fresh: str) -> None:
    base = FIXTURES / "gpt2" / "base"
    train, data = TrainConfig(init_from=str(base), batch=2), DataConfig(seq_len=16)
    taken = start(Config(model=model_of(str(base)), train=train, data=data))
    model = dataclasses.replace(model_of(str(base)), **sizes)
    with pytest.raises(ConfigError, match=f"model.{next(iter(sizes))} is"):
        start(Config(model=model, train=train, data=data))
    found = start(Config(model=model, train=train, data=data, tune=TuneConfig(fresh=(fresh,))))
    assert {fresh} == {name for name in found if name not in taken or found[name].shape != taken[name].shape}
    inner = [name for name in taken if name != fresh]
    jax.tree.map(np.testing.assert_array_equal, {n: taken[n] for n in inner}, {n: found[n] for n in inner})


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({}, r"embed is \(61, 24\) there, \(40, 24\) here; .* name in tune\.fresh what is to be drawn anew"),
        ({"fresh": ("unembed",)}, r"embed is \(61, 24\) there, \(40, 24\) here"),
        ({"fresh": ("unembd",)}, r"tune\.fresh: 'unembd' matches no weight; is 'unembed' meant\?"),
    ],
)
def test_what_is_not_named_must_fit(base: tuple[str, Params], tune: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        without_data(config("llama3", tune=tune, train__init_from=base[0], model__vocab=40)).start.check()
    assert "\n" not in str(caught.value)


def test_without_trained_weights_nothing_is_fresh() -> None:
    with pytest.raises(ConfigError, match=r"tune\.fresh: all weights are drawn anew without train\.init_from"):
        without_data(config("llama3", tune={"fresh": ("unembed",)}))
