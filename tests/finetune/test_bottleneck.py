"""Bottleneck adapters compute what their formula says, and are never taken for matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import ConfigError
from lmjax.finetune.bottleneck import Bottleneck
from lmjax.models.linear import linear
from lmjax.models.read import as_array
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.weights import by_path, map_weights
from tests.finetune.test_low_rank import drawn
from tests.finetune.test_parts import config

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_network_stands_behind_what_a_matrix_gives() -> None:
    x, w, down, up = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, 4, 6), (4, 6, 5), (5, 2), (2, 5)])
    )
    y = np.einsum("btnh,nhd->btd", x, w)
    wanted = y + np.asarray(jax.nn.gelu(y @ np.asarray(down))) @ np.asarray(up)
    np.testing.assert_allclose(linear(x, Bottleneck(w, down, up), contract=2), wanted, rtol=1e-4, atol=1e-4)


def test_nothing_changes_at_the_start_and_nothing_is_merged() -> None:
    task = without_data(config("llama3", tune={"adapter": {"name": "bottleneck", "rank": 3}}))
    experiment = assemble.assemble(task)
    params, frozen = assemble.initial_state(experiment).params, assemble.frozen_params(experiment)
    places = {path.removeprefix("adapter/segments/0/0/").rpartition("/")[0] for path in by_path(params)}
    assert places == {"attention/output", "mlp/down"}
    assert task.language is not None
    model, weights = task.language.scorer, task.language.weights
    tokens_BT, logits = jax.random.randint(jax.random.key(1), (2, 12), 0, 61), jax.jit(model.logits)
    before_BTV = logits(frozen["base"], tokens_BT)
    np.testing.assert_array_equal(logits(weights(frozen, params), tokens_BT), before_BTV)
    tuned = weights(frozen, drawn(params))
    assert float(jnp.abs(logits(tuned, tokens_BT) - before_BTV).max()) > 0.1
    with pytest.raises(ConfigError, match="it cannot be merged"):
        map_weights(as_array, model.spec, tuned)
