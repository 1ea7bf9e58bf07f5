"""Bottleneck adapters compute what their formula says; what holds of all adapters is in test_adapters.py."""

import jax
import numpy as np
import pytest

from lmjax.finetune.bottleneck import Bottleneck
from lmjax.models.linear import linear
from lmjax.registry import without_data
from lmjax.weights import by_path
from tests.finetune.test_parts import config

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_network_stands_behind_what_a_matrix_gives() -> None:
    x, w, down, up = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, 4, 6), (4, 6, 5), (5, 2), (2, 5)])
    )
    y = np.einsum("btnh,nhd->btd", x, w)
    wanted = y + np.asarray(jax.nn.gelu(y @ np.asarray(down))) @ np.asarray(up)
    np.testing.assert_allclose(linear(x, Bottleneck(w, down, up), contract=2), wanted, rtol=1e-4, atol=1e-4)


def test_it_stands_behind_what_writes_to_the_stream() -> None:
    task = without_data(config("llama3", tune={"adapter": {"name": "bottleneck", "rank": 3}}))
    places = {path.removeprefix("adapter/segments/0/0/").rpartition("/")[0] for path in by_path(task.spec)}
    assert places == {"attention/output", "mlp/down"}
