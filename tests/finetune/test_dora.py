"""DoRA computes what its formula says; what holds of all adapters is in test_adapters.py."""

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.finetune.dora import attached, start
from lmjax.models.linear import linear
from lmjax.train.config import AdapterConfig
from lmjax.weights import Weight

WEIGHT = Weight("heads head_dim -> embed", sizes=(4, 6, 5))


def arrays() -> tuple[jax.Array, ...]:
    shapes = [(2, 3, 4, 6), (4, 6, 5), (4, 6, 2), (2, 5), (5,)]
    return tuple(jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))


def test_each_column_has_its_direction_and_its_length() -> None:
    x, w, down, up, magnitude = arrays()
    one = attached(WEIGHT, AdapterConfig(name="dora", rank=2, alpha=3.0), w, beside(down, up, magnitude), None)
    changed = np.asarray(w).reshape(24, 5) + 1.5 * np.asarray(down).reshape(24, 2) @ np.asarray(up)
    wanted = changed * np.asarray(magnitude) / np.linalg.norm(changed, axis=0)
    np.testing.assert_allclose(one.as_array(WEIGHT), wanted.reshape(4, 6, 5), rtol=1e-5)
    np.testing.assert_allclose(linear(x, one, contract=2), x.reshape(2, 3, 24) @ wanted, rtol=1e-4, atol=1e-4)


def test_lengths_are_taken_for_constants() -> None:
    """The gradients by B and m are those of (W + s A B) m / c, for the numbers c that the lengths are now."""
    x, w, down, up, magnitude = arrays()
    cfg = AdapterConfig(name="dora", rank=2, alpha=3.0)
    lengths = jnp.linalg.norm((w + 1.5 * jnp.tensordot(down, up, 1)).reshape(24, 5), axis=0)

    def ours(up: jax.Array, magnitude: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(linear(x, attached(WEIGHT, cfg, w, beside(down, up, magnitude), None), contract=2)))

    def plain(up: jax.Array, magnitude: jax.Array) -> jax.Array:
        changed = (w + 1.5 * jnp.tensordot(down, up, 1)) * magnitude / lengths
        return jnp.sum(jnp.sin(linear(x, changed, contract=2)))

    for found, wanted in zip(*(jax.grad(f, argnums=(0, 1))(up, magnitude) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_column_of_zeros_stays_one() -> None:
    """As of the rows that a head has for tokens which do not exist: no length is divided by."""
    x, w, down, up, _ = arrays()
    w = w.at[..., 2].set(0)
    (magnitude,) = start(WEIGHT, w).values()
    one = attached(WEIGHT, AdapterConfig(name="dora", rank=2), w, beside(down, jnp.zeros_like(up), magnitude), None)
    np.testing.assert_allclose(linear(x, one, contract=2), linear(x, w, contract=2), rtol=1e-5, atol=1e-5)


def beside(down: jax.Array, up: jax.Array, magnitude: jax.Array) -> dict[str, jax.Array]:
    return {"down": down, "up": up, "magnitude": magnitude}
