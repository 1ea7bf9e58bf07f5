import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models import linear as module
from lmjax.models.linear import linear

SHAPES = [(6, 10), (10, 6), (8, 16), (16, 16)]


def product(x: jax.Array, w: jax.Array, rows_out: bool) -> jax.Array:
    return jnp.einsum("...I,OI->...O" if rows_out else "...I,IO->...O", x, w)


def gradients(multiply, x: jax.Array, w: jax.Array, dy: jax.Array):
    y, back = jax.vjp(multiply, x, w)
    return (y, *back(dy.astype(y.dtype)))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows_out", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_the_product(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], rows_out: bool, dtype: jnp.dtype, platform: str
) -> None:
    monkeypatch.setattr(module, "platform", lambda: platform)
    n_in, n_out = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTI = jax.random.normal(keys[0], (2, 3, n_in), dtype)
    w = jax.random.normal(keys[1], (n_out, n_in) if rows_out else (n_in, n_out), dtype)
    dy_BTO = jax.random.normal(keys[2], (2, 3, n_out), dtype)
    ours = jax.jit(lambda *xs: gradients(lambda x, w: linear(x, w, rows_out=rows_out), *xs))(x_BTI, w, dy_BTO)
    exact = gradients(lambda x, w: product(x, w, rows_out), *(a.astype(jnp.float32) for a in (x_BTI, w, dy_BTO)))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("platform", "arranged"), [("cpu", True), ("gpu", False), ("tpu", False)])
def test_only_a_cpu_gets_its_own_form(monkeypatch: pytest.MonkeyPatch, platform: str, arranged: bool) -> None:
    monkeypatch.setattr(module, "platform", lambda: platform)
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 2), jnp.bfloat16)
    text = str(jax.make_jaxpr(jax.grad(lambda w: linear(x, w).sum()))(w))
    assert ("optimization_barrier" in text) == ("layout_constraint" in text) == arranged
