"""Products of groups of rows, by blocks: against jax.lax.ragged_dot, whatever the division into groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.moe import grouped

pytestmark = pytest.mark.usefixtures("quick_compilation")


def value_and_gradients(product, x_AI, w_EIO, rows_E):
    def scalar(x_AI, w_EIO):
        y_AO = product(x_AI, w_EIO, rows_E)
        return jnp.sum(jnp.sin(y_AO)), y_AO

    return jax.grad(scalar, argnums=(0, 1), has_aux=True)(x_AI, w_EIO)


@pytest.mark.parametrize(
    "divisions",
    [
        [(0, 1, 0, 1), (2, 0, 0, 0)],  # fewer rows than groups: blocks of one row
        [(3, 0, 13, 0), (16, 0, 0, 0), (0, 0, 0, 16), (4, 4, 4, 4), (1, 5, 9, 1)],  # of four
        [(200, 333), (533, 0), (0, 533), (266, 267), (65, 468)],  # of 66
    ],
)
def test_blocks_equal_the_ragged_product(divisions) -> None:
    rng = np.random.default_rng(0)
    x_AI = jnp.asarray(rng.standard_normal((sum(divisions[0]), 5)), jnp.float32)
    w_EIO = jnp.asarray(rng.standard_normal((len(divisions[0]), 5, 3)), jnp.float32)
    blocks, ragged = (
        jax.jit(lambda x, w, rows, product=product: value_and_gradients(product, x, w, rows))
        for product in (grouped.dot_by_blocks, jax.lax.ragged_dot)
    )
    for rows_E in divisions:
        got, want = (run(x_AI, w_EIO, jnp.asarray(rows_E)) for run in (blocks, ragged))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_what_a_group_computes_cannot_reach_another() -> None:
    """Not even a matrix or a row that is not finite: padding is dropped, not multiplied by zero."""
    x_AI, w_EIO = jnp.ones((24, 2)).at[:7].set(jnp.inf), jnp.ones((3, 2, 2)).at[0].set(jnp.nan)
    y_AO = jax.jit(grouped.dot_by_blocks)(x_AI, w_EIO, jnp.asarray([7, 0, 17]))
    assert np.isnan(y_AO[:7]).all() and (np.asarray(y_AO[7:]) == 2).all()


@pytest.mark.parametrize(("platform", "products"), [("cpu", "dot_general"), ("tpu", "ragged_dot_general")])
def test_blocks_are_for_cpus(monkeypatch: pytest.MonkeyPatch, platform: str, products: str) -> None:
    monkeypatch.setattr(grouped, "platform", lambda: platform)
    program = jax.make_jaxpr(lambda *arguments: grouped.grouped_dot(*arguments))  # traced anew
    assert f" {products}[" in str(program(jnp.ones((8, 2)), jnp.ones((2, 2, 2)), jnp.asarray([3, 5])))
