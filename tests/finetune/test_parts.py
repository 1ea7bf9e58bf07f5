"""Which weights are trained, how the others are held, and what a config that asks for the impossible is told."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import config as configs
from lmjax.config import Config, default_config
from lmjax.errors import ConfigError
from lmjax.finetune.select import matching
from lmjax.finetune.storage import STORAGES, Int8, stored
from lmjax.finetune.tune import parts
from lmjax.models import decoder
from lmjax.plan.memory import of_declaration
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.run.dry_run import describe
from lmjax.weights import by_path, count, map_weights
from tests.conftest import FAMILIES


def config(family: str = "llama3", tune: dict[str, Any] | None = None, **settings: Any) -> Config:
    """A tiny model of a family; settings by dotted keys, the dots as two underscores."""
    tree = default_config().to_dict()
    tree["model"] = dataclasses.asdict(FAMILIES[family])
    tree["tune"] = tree["tune"] | (tune or {})
    tree["data"]["seq_len"], tree["train"]["batch"] = 12, 2
    for name, value in settings.items():
        *groups, last = name.split("__")
        node = tree
        for group in groups:
            node = node[group]
        node[last] = value
    return configs.parse(tree)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("unembed", {"unembed"}),
        ("attention/query", {"segments/0/0/attention/query"}),
        ("query", {"segments/0/0/attention/query"}),
        ("segments/*/down", {"segments/0/0/mlp/down"}),
        ("mlp/*", {f"segments/0/0/mlp/{name}" for name in ("up", "gate", "down")}),
        ("* -> vocab", {"unembed"}),
        ("mlp  ->  embed", {"segments/0/0/mlp/down"}),
        ("* -> kv_heads head_dim", {"segments/0/0/attention/key", "segments/0/0/attention/value"}),
        ("-> embed", {"final_norm/scale", *(f"segments/0/0/{name}_norm/scale" for name in ("attention", "mlp"))}),
    ],
)
def test_a_pattern_matches_paths_their_ends_and_axes(pattern: str, expected: set[str]) -> None:
    assert {*matching(decoder.weights(FAMILIES["llama3"]), [pattern], "here")} == expected


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"train": ("unembd",)}, r"tune\.train: 'unembd' matches no weight; is 'unembed' meant\?"),
        ({"freeze": ("* -> vocabs",)}, r"tune\.freeze: .* is '.* -> vocab.*' meant\?|tune\.freeze: .*embed -> vocab"),
        ({"adapter": {"targets": ("*_norm/scale",)}}, r"tune\.adapter\.targets: '\*_norm/scale' matches no weight"),
        ({"freeze": ("*",)}, "leaves nothing to train"),
        ({"train": ("query",), "adapter": {"targets": ("query",)}}, "would be trained, and have an adapter beside it"),
        ({"freeze": ("embed",), "adapter": {}}, "means nothing beside tune.adapter, with which no weight is trained"),
        ({"store": "int8"}, r"tune\.store=int8 is how frozen weights are held, and none is frozen; leave it out"),
        ({"adapter": {"name": "ia3", "rank": 4}}, r"tune\.adapter\.rank means nothing to tune\.adapter\.name=ia3"),
        ({"adapter": {"name": "prompt", "targets": ("query",)}}, r"tune\.adapter\.targets means nothing to .*=prompt"),
        ({"adapter": {"name": "ia3", "targets": ("embed",)}}, "'embed' matches no weight"),
        ({"adapter": {"targets": ("unembed",), "dropout": 0.1}}, "dropout acts on what matrices of layers read"),
        ({"adapter": {"dropout": 0.1}, "mesh": {"layout": "dp+pp"}}, "the stages of a pipeline do not know it"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tune: dict[str, Any], message: str) -> None:
    layout = tune.pop("mesh", {}).get("layout", "fsdp")
    with pytest.raises(ConfigError, match=message) as caught:
        without_data(config(tune=tune, mesh__layout=layout))
    assert "\n" not in str(caught.value)


def test_without_tune_a_task_stays_as_it_is() -> None:
    task = without_data(config())
    assert task.frozen is None and {*by_path(task.spec)} == {*by_path(decoder.weights(FAMILIES["llama3"]))}


def test_frozen_weights_are_in_neither_params_nor_optimizer_state() -> None:
    """As a head alone is trained, or all but the embeddings."""
    head = without_data(config(tune={"train": ("unembed",)}))
    assert [*by_path(head.spec)] == ["unembed"] and head.frozen is not None
    state = assemble.abstract_state(assemble.assemble(head))
    shapes = {x.shape for x in jax.tree.leaves((state.params, state.opt_state)) if x.shape}
    assert shapes == {(24, 61)}
    others = without_data(config(tune={"freeze": ("embed",)}))
    assert others.frozen is not None and [*by_path(others.frozen.spec["base"])] == ["embed"]
    assert count(others.spec).total + 61 * 24 == count(decoder.weights(FAMILIES["llama3"])).total


@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_a_weight_in_8_bits_is_near_what_it_was(family: str) -> None:
    """By half a step of its column; what is declared float32, scales and biases stay."""
    spec, rng = decoder.weights(FAMILIES[family]), np.random.default_rng(0)
    params = map_weights(lambda weight: jnp.float32(rng.standard_normal(weight.shape)), spec)
    held = stored(spec, params, "int8")

    def check(weight: Any, w: jax.Array, one: Any) -> None:
        if weight.kind not in ("matmul", "lookup") or weight.float32:
            assert one is w
            return
        assert isinstance(one, Int8) and one.values.dtype == jnp.int8 and one.values.shape == w.shape
        assert bool(jnp.all(jnp.abs(one.as_array(weight) - w) <= one.scale / 2 * 1.001))
        assert one.scale.size < w.size / 4

    map_weights(check, spec, params, held)
    zero = STORAGES["int8"](spec["unembed"], jnp.zeros((24, 61)))
    np.testing.assert_array_equal(zero.as_array(spec["unembed"]), np.zeros((24, 61)))


@pytest.mark.parametrize("store", STORAGES)
def test_what_is_held_takes_the_bytes_that_are_counted(store: str) -> None:
    cfg = config(tune={"adapter": {}, "store": store})
    experiment = assemble.assemble(without_data(cfg))
    frozen, abstract = assemble.frozen_params(experiment), assemble.abstract_frozen(experiment)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), frozen) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    entries = sum(w.size for w in by_path(decoder.weights(FAMILIES["llama3"])).values())
    held = sum(x.nbytes for x in jax.tree.leaves(frozen))
    assert {"float32": 4 * entries, "bfloat16": 2.1 * entries, "int8": 1.4 * entries}[store] >= held


def test_a_plan_counts_frozen_weights() -> None:
    experiment = assemble.assemble(without_data(config(tune={"adapter": {}, "store": "int8"})))
    frozen = assemble.abstract_frozen(experiment)
    declared = of_declaration(assemble.abstract_state(experiment), frozen, batch=())
    assert declared.frozen == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen)) > 0


def test_a_dry_run_says_what_tuning_saves() -> None:
    said = "\n".join(describe(config(tune={"adapter": {"rank": 2}, "store": "bfloat16"})))
    chosen = parts(without_data(config())._replace(cfg=config(tune={"adapter": {"rank": 2}})))
    trained = count(chosen.params_spec).total
    whole = trained + count(chosen.frozen_spec).total
    assert f"parameters   {trained:,} total" in said and f"{trained / whole:.2%} of {whole:,}" in said
    assert "of frozen weights" in said
