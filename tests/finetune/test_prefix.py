"""Prefix tuning: keys and values in front, as transformers sees those of a cache."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lmjax.config import Config
from lmjax.data.config import DataConfig
from lmjax.models.model import Model
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.tasks.start import model_of
from lmjax.train.config import AdapterConfig, TrainConfig, TuneConfig
from lmjax.weights import Params
from tests.finetune.peft_fixtures import FIXTURES
from tests.finetune.test_low_rank import drawn
from tests.models.test_front import P, logits

pytestmark = pytest.mark.usefixtures("quick_compilation")


def standing_on(base: Path, kind: str) -> tuple[Model, Params, Any]:
    """(a Hugging Face model, its weights with something drawn in front, what was drawn)."""
    model = dataclasses.replace(model_of(str(base)), dtype="float32")
    cfg = Config(
        model=model,
        data=DataConfig(seq_len=16),
        train=TrainConfig(init_from=str(base), batch=2),
        tune=TuneConfig(adapter=AdapterConfig(name=kind, length=P)),
    )
    task = without_data(cfg)
    experiment = assemble.assemble(task)
    params = jax.tree.map(lambda x: 3 * x, drawn(assemble.initial_state(experiment).params))
    assert task.language is not None
    weights = task.language.weights(assemble.frozen_params(experiment), params)
    return task.language.scorer, weights, params["adapter"]


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_logits_are_those_of_transformers_with_a_cache(name: str) -> None:
    """Whose texts go on where the cache ends."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, weights, drawn_ones = standing_on(FIXTURES / name / "base", "prefix")
    tokens_BT = np.random.default_rng(2).integers(weights["embed"].shape[0], size=(2, 7))
    attention = drawn_ones["segments"]["0"]["0"]["attention"]
    cache = transformers.DynamicCache()
    for layer, pair in enumerate(zip(*(attention[part]["prefix"] for part in ("key", "value")), strict=True)):
        k_BKPH, v_BKPH = (torch.tensor(np.asarray(x)).swapaxes(0, 1).expand(2, -1, -1, -1) for x in pair)
        cache.update(k_BKPH, v_BKPH, layer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name / "base")
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens_BT), past_key_values=cache).logits
    np.testing.assert_allclose(logits(model, weights, tokens_BT), wanted.numpy(), rtol=0, atol=1e-4)
