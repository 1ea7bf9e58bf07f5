"""(IA)^3 computes what its formula says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.read import as_array
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.weights import by_path, map_weights
from tests.finetune.test_low_rank import drawn
from tests.finetune.test_parts import config

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_rescaling_is_as_merged_and_nothing_at_the_start() -> None:
    """Queries, keys and values, and what output and down read."""
    task = without_data(config("llama3", tune={"adapter": {"name": "ia3", "targets": ("segments/*", "unembed")}}))
    experiment = assemble.assemble(task)
    params, frozen = assemble.initial_state(experiment).params, assemble.frozen_params(experiment)
    shapes = {path.removeprefix("adapter/segments/0/0/"): x.shape for path, x in by_path(params).items()}
    assert shapes["attention/query/by"] == (3, 4, 6) and shapes["attention/output/by"] == (3, 4, 6)
    assert shapes["mlp/up/by"] == shapes["mlp/down/by"] == (3, 40) and shapes["adapter/unembed/by"] == (61,)
    assert task.language is not None
    model, weights = task.language.scorer, task.language.weights
    tokens_BT, logits = jax.random.randint(jax.random.key(1), (2, 12), 0, 61), jax.jit(model.logits)
    before_BTV = logits(frozen["base"], tokens_BT)
    np.testing.assert_array_equal(logits(weights(frozen, params), tokens_BT), before_BTV)
    tuned = weights(frozen, jax.tree.map(lambda one, more: one + more, params, drawn(params)))
    beside_BTV = logits(tuned, tokens_BT)
    assert float(jnp.abs(beside_BTV - before_BTV).max()) > 0.1
    merged_BTV = logits(map_weights(as_array, model.spec, tuned), tokens_BT)
    np.testing.assert_allclose(beside_BTV, merged_BTV, rtol=1e-5, atol=1e-5)
