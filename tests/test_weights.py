"""One declaration, and all that is derived from it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import ConfigError
from lmjax.weights import (
    Counts,
    Spec,
    Weight,
    abstract,
    bind,
    by_path,
    count,
    decays,
    fan_in,
    initialize,
    map_weights,
    merge,
    normal,
    ones,
    path_hash,
    stacked,
    zeros,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

DIMS = {"embed": 6, "heads": 2, "head_dim": 5, "vocab": 9}
QUERY = Weight("embed -> heads head_dim")


def small_spec(tied: bool = False) -> Spec:
    return bind(
        {
            "embed": Weight("vocab -> embed", kind="lookup", init=normal(0.5), tied=tied),
            "layer": {
                "query": QUERY,
                "output": Weight("heads head_dim -> embed"),
                "scale": Weight("-> embed", kind="scale", init=ones),
                "bias": Weight("-> heads head_dim", kind="bias", init=zeros),
            },
            "average": Weight("-> embed", kind="buffer", init=zeros),
        },
        DIMS,
    )


def test_axes_are_read_as_written() -> None:
    weight = Weight("layers | embed -> heads head_dim", sizes=(3, 6, 2, 5))
    assert weight.batch_axes == ("layers",)
    assert weight.in_axes == ("embed",)
    assert weight.out_axes == ("heads", "head_dim")
    assert weight.names == ("layers", "embed", "heads", "head_dim")
    assert (weight.size, weight.fan_in) == (180, 6)
    assert weight.unstacked() == Weight("embed -> heads head_dim", sizes=(6, 2, 5))
    assert Weight("-> embed", sizes=(6,)).fan_in == 1
    assert small_spec()["layer"]["output"].fan_in == 10


def test_stacking_keeps_what_a_single_weight_is() -> None:
    single = bind({"query": QUERY}, DIMS)
    twice = stacked(stacked(single, 3), 4)["query"]
    assert twice.shape == (4, 3, 6, 2, 5)
    assert twice.batch_axes == ("layers", "layers")
    assert twice.fan_in == single["query"].fan_in
    assert twice.unstacked() == single["query"]
    assert stacked(single, 3)["query"].of_layer() == single["query"]
    experts = bind({"up": Weight("experts | embed -> vocab", active=2)}, DIMS | {"experts": 4})
    assert stacked(experts, 3)["up"].of_layer() == experts["up"]


def test_bad_axes_are_refused() -> None:
    with pytest.raises(ConfigError, match="the axis 'heads' has size 0"):
        bind({"query": QUERY}, DIMS | {"heads": 0})
    with pytest.raises(AssertionError, match="appears twice"):
        bind({"square": Weight("embed -> embed")}, DIMS)
    with pytest.raises(AssertionError, match="not bound"):
        _ = QUERY.shape


def test_counts_by_every_convention() -> None:
    matmuls, vectors, table = 60 + 60, 6 + 10, 54
    total = matmuls + vectors + table
    assert count(small_spec()) == Counts(total, matmuls + vectors, matmuls, total)
    assert count(small_spec(tied=True)) == Counts(total, matmuls + vectors, matmuls + table, total)


def test_of_experts_those_that_a_token_passes_through_are_active() -> None:
    dims = {"experts": 8, "embed": 6, "expert_mlp": 5}
    spec = stacked(bind({"up": Weight("experts | embed -> expert_mlp", active=2)}, dims), 3)
    assert count(spec) == Counts(total=3 * 8 * 30, non_embedding=3 * 8 * 30, matmul=3 * 2 * 30, active=3 * 2 * 30)


def test_masks_follow_the_kind() -> None:
    decayed = by_path(map_weights(decays, small_spec()))
    assert {path for path, keep in decayed.items() if keep} == {"embed", "layer/query", "layer/output"}
    trainable = by_path(map_weights(lambda weight: weight.trainable, small_spec()))
    assert {path for path, keep in trainable.items() if not keep} == {"average"}


def test_two_trees_merge_at_any_depth_and_share_no_leaf() -> None:
    base, more = {"a": 1, "layer": {"b": 2, "norm": {"c": 3}}}, {"layer": {"norm": {"d": 4}}, "e": 5}
    assert merge(base, more) == {"a": 1, "layer": {"b": 2, "norm": {"c": 3, "d": 4}}, "e": 5}
    with pytest.raises(AssertionError):
        merge(base, {"layer": {"b": 6}})


def test_abstract_and_initialized_agree() -> None:
    spec = small_spec()
    shapes, params = by_path(abstract(spec)), by_path(initialize(spec, jax.random.key(0)))
    assert {path: (x.shape, x.dtype) for path, x in shapes.items()} == {
        path: (x.shape, x.dtype) for path, x in params.items()
    }
    assert abstract(spec, jnp.bfloat16)["embed"].dtype == jnp.bfloat16
    assert np.all(params["layer/scale"] == 1)
    assert not np.any(params["layer/bias"])


def test_fan_in_keeps_the_variance_of_a_product() -> None:
    spec = stacked(bind({"w": Weight("embed -> heads head_dim", init=fan_in)}, DIMS | {"embed": 400, "heads": 50}), 2)
    w = initialize(spec, jax.random.key(1))["w"]
    assert float(w.std()) == pytest.approx(1 / math.sqrt(400), rel=0.02)
    assert float(jnp.corrcoef(w[0].ravel(), w[1].ravel())[0, 1]) == pytest.approx(0, abs=0.02)


def test_a_start_depends_on_key_path_and_place_alone() -> None:
    spec = bind({"a": {"w": QUERY}, "b": {"w": QUERY}}, DIMS)
    params = initialize(spec, jax.random.key(0))
    assert not np.any(params["a"]["w"] == params["b"]["w"])
    assert not np.any(params["a"]["w"] == initialize(spec, jax.random.key(1))["a"]["w"])
    alone = initialize({"b": spec["b"]}, jax.random.key(0))
    np.testing.assert_array_equal(alone["b"]["w"], params["b"]["w"])
    deep, shallow = (initialize(stacked(spec, layers), jax.random.key(0)) for layers in (5, 2))
    np.testing.assert_array_equal(deep["a"]["w"][:2], shallow["a"]["w"])


def test_path_hash_is_stable() -> None:
    """Every recorded seed hangs on it: CRC-32, with its published check value, less the sign bit."""
    assert path_hash("123456789") == 0xCBF43926 - 2**31
