"""Metrics are sums and weights until the host divides them."""

import jax.numpy as jnp
import numpy as np

from lmjax.metrics import finish


def test_quotients_are_taken_in_float64_and_without_weight_there_is_no_value() -> None:
    found = finish({"loss": (jnp.float32(1), jnp.float32(3)), "none": (jnp.float32(0), jnp.float32(0))})
    assert found == {"loss": 1 / 3} and isinstance(found["loss"], float)


def test_runs_stacked_in_front_keep_their_own_values() -> None:
    found = finish({"loss": (jnp.array([1.0, 4.0, 0.0]), jnp.array([2.0, 2.0, 0.0]))})
    np.testing.assert_array_equal(found["loss"], [0.5, 2.0, np.nan])
