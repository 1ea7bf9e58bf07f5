"""Weights none of which is zero or one, where a mistake could hide: biases, scales and buffers too."""

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.weights import Params, Spec, Weight, map_weights


def random_params(spec: Spec, other_std: float = 0.5) -> Params:
    """Matrices by their fan-in; all other weights with a standard deviation of `other_std`."""
    rng = np.random.default_rng(0)

    def draw(weight: Weight) -> jax.Array:
        std = weight.unstacked().fan_in ** -0.5 if weight.kind == "matmul" else other_std
        return jnp.asarray(std * rng.standard_normal(weight.shape), jnp.float32)

    return map_weights(draw, spec)
