"""The last layers of stacks are trained, as if all were and the first ones had no gradient."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from lmjax.devices.place import shard_batch
from lmjax.errors import ConfigError
from lmjax.finetune.last_layers import trained_repeats
from lmjax.models import decoder
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.weights import Params, by_path
from tests.conftest import FAMILIES
from tests.finetune.eight_devices import random_batch
from tests.finetune.test_parts import config

pytestmark = pytest.mark.usefixtures("quick_compilation")


def stepped(family: str, tune: dict[str, Any]) -> tuple[Params, Params, Params, Params]:
    """(params at the start, after a step of SGD, frozen weights, all weights as a model reads them)."""
    sgd = {
        "optimizer__name": "sgd",
        "optimizer__schedule__warmup": 0,
        "optimizer__clip_norm": None,
        "optimizer__learning_rate": 1.0,
    }
    cfg = config(family, tune=tune, model__vocab=64, **sgd)
    experiment = assemble.assemble(without_data(cfg))
    state, frozen = assemble.initial_state(experiment), assemble.frozen_params(experiment)
    start, batch = jax.device_get(state.params), shard_batch(random_batch(cfg), None, cfg.train.batch)
    state, _ = assemble.compiled_step(experiment)(state, frozen, batch)
    language = experiment.task.language
    assert language is not None
    return start, state.params, frozen, language.weights(frozen, state.params)


@pytest.mark.parametrize(
    ("family", "layers", "repeats"),
    [
        ("llama3", 2, {"0": 2}),
        pytest.param("gemma2", 3, {"0": 1, "1": 1}, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", 1, {"0": 0, "1": 1}, marks=pytest.mark.slow),
    ],
)
def test_they_move_as_in_full_tuning_and_the_others_stay_to_the_bit(
    family: str, layers: int, repeats: dict[str, int]
) -> None:
    assert trained_repeats(FAMILIES[family], layers) == repeats
    start, params, frozen, tuned = stepped(family, {"last_layers": layers})
    assert {path.partition("/")[0] for path in by_path(params)} == {"segments"}
    full = stepped(family, {"freeze": ("embed",)})[3]  # whatever is frozen beside them
    spec = decoder.weights(dataclasses.replace(FAMILIES[family], vocab=64))
    for path, w in by_path(tuned).items():
        root, _, rest = path.partition("/")
        last = repeats[rest.partition("/")[0]] if root == "segments" else 0
        first = by_path(spec)[path].shape[0] - last
        held = by_path(frozen["base"]).get(path)
        if held is not None:
            np.testing.assert_array_equal(w[:first], held, err_msg=path)
        if last:
            assert by_path(params)[path].shape[0] == last
            np.testing.assert_allclose(w[first:], by_path(full)[path][first:], rtol=1e-4, atol=1e-6, err_msg=path)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), jax.device_get(params), start)
    assert max(by_path(moved).values()) > 0.01


def test_no_gradient_goes_into_the_first_layers() -> None:
    """What a step computes falls with the number of layers that are trained."""

    def flops(tune: dict[str, Any]) -> float:
        experiment = assemble.assemble(without_data(config("llama3", tune=tune, model__layers=8)))
        arguments = (
            assemble.abstract_state(experiment),
            assemble.abstract_frozen(experiment),
            assemble.abstract_batch(experiment),
        )
        cost = assemble.jitted_step(experiment).lower(*arguments).cost_analysis()
        return float(cost["flops"])

    assert flops({"last_layers": 2}) < 0.6 * flops({"train": ("segments/*",)})


@pytest.mark.parametrize(
    ("family", "tune", "message"),
    [
        ("llama3", {"last_layers": 4}, r"tune\.last_layers=4: of model\.layers=3 so many are too many; make it 3"),
        (
            "gemma2",
            {"last_layers": 2},
            r"tune\.last_layers=2: of model\.layers=5 so many begin within a period; make it [13]",
        ),
        ("llama3", {"last_layers": 1, "adapter": {}}, r"not of tune\.adapter; use one"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(family: str, tune: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        without_data(config(family, tune=tune))
    assert "\n" not in str(caught.value)
