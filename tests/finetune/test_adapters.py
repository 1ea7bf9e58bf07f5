"""What holds of every kind of adapter, in every place where a weight is multiplied by."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.windows import as_batch
from lmjax.errors import ConfigError
from lmjax.finetune.adapters import ADAPTERS
from lmjax.models.read import as_array
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.weights import Params, by_path, map_weights
from tests.finetune.test_parts import config

pytestmark = pytest.mark.usefixtures("quick_compilation")

# How far logits may be from those of the frozen model before a step: what is divided by a length and multiplied by it
# is rounded; all others are equal to the bit.
ROUNDING = {"dora": 1e-5}
NO_MATRIX = {"bottleneck"}
IN_FRONT = {"prompt", "prefix"}  # of texts: nothing stands beside a weight, and nothing is as without them


def made(kind: str, family: str, **tune: Any) -> tuple[Any, Params, Params]:
    """(the experiment, frozen weights, params as they start), with adapters wherever this kind can have one."""
    of_kind: dict[str, Any] = {"rank": 3} if "rank" in ADAPTERS[kind].settings else {}
    if kind not in IN_FRONT:
        of_kind["targets"] = ("*",)
    cfg = config(family, tune={"adapter": {"name": kind, **of_kind}, **tune})
    experiment = assemble.assemble(without_data(cfg))
    return experiment, assemble.frozen_params(experiment), assemble.initial_state(experiment).params


def moved(params: Params) -> Params:
    """As if they had been trained: each entry a little elsewhere, so that logits stay of a model's usual size."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: jnp.float32(np.asarray(x) + 0.03 * rng.standard_normal(x.shape)), params)


CASES = [(kind, "llama3", "int8") for kind in ADAPTERS if kind not in IN_FRONT]
CASES += [("lora", "gpt2", "float32"), ("dora", "gpt2", "float32")]
SLOW = [("lora", family, "float32") for family in ("gemma2", "deepseek_v3")]


@pytest.mark.parametrize(
    ("kind", "family", "store"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_nothing_changes_at_the_start_and_beside_is_as_merged(kind: str, family: str, store: str) -> None:
    experiment, frozen, params = made(kind, family, store=store)
    language, tokens_BT = experiment.task.language, jax.random.randint(jax.random.key(1), (2, 12), 0, 61)
    model, logits = language.scorer, jax.jit(language.scorer.logits)
    before_BTV = logits(map_weights(as_array, model.spec, frozen["base"]), tokens_BT)
    at_start_BTV = logits(language.weights(frozen, params), tokens_BT)
    np.testing.assert_allclose(at_start_BTV, before_BTV, rtol=0, atol=ROUNDING.get(kind, 0))
    tuned = language.weights(frozen, moved(params))
    beside_BTV = logits(tuned, tokens_BT)
    assert float(jnp.abs(beside_BTV - before_BTV).max()) > 0.1
    if kind in NO_MATRIX:
        with pytest.raises(ConfigError, match="it cannot be merged"):
            map_weights(as_array, model.spec, tuned)
        return
    merged_BTV = logits(map_weights(as_array, model.spec, tuned), tokens_BT)
    np.testing.assert_allclose(beside_BTV, merged_BTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_steps_change_adapters_and_nothing_else(kind: str) -> None:
    """Each of them, and frozen weights stay to the bit."""
    experiment, frozen, params = made(kind, "llama3", store="bfloat16")
    step, state, before = assemble.compiled_step(experiment), assemble.initial_state(experiment), jax.device_get(frozen)
    rows_BU = np.random.default_rng(0).integers(0, 61, (2, 13)).astype(np.int32)
    for number in range(5):
        ids_B = 2 * number + np.arange(2)
        state, _ = step(state, frozen, as_batch(rows_BU, rows_BU, ids_B, experiment.cfg.data.documents))
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    moved_by = {path: float(jnp.abs(x - by_path(params)[path]).max()) for path, x in by_path(state.params).items()}
    assert {path.split("/")[0] for path in moved_by} == {"adapter"} and all(moved_by.values()), moved_by


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_eight_devices_compute_what_one_does(on_eight_devices: Any, marks: str) -> None:
    on_eight_devices(Path(__file__).parent / "eight_devices.py", "-m", marks)
