"""Products in 8 bits against exact ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.float8 import BACKWARD, FORWARD, Float8, scaled
from lmjax.models.linear import linear

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 300.0, 1e30])
@pytest.mark.parametrize(("dtype", "error"), [(FORWARD, 2**-4), (BACKWARD, 2**-3)])
def test_a_scale_is_the_power_of_two_that_uses_the_whole_range(size: float, dtype: jnp.dtype, error: float) -> None:
    """An entry within the type's normal numbers is kept to half a place of its mantissa, whatever the size of all."""
    x = jnp.asarray(size * np.random.default_rng(0).standard_normal(1000), jnp.bfloat16)
    found = scaled(x, dtype)
    fraction, _ = np.frexp(float(found.scale))
    assert fraction == 0.5
    largest = float(jnp.max(jnp.abs(found.numbers(dtype).astype(jnp.float32))))
    assert float(jnp.finfo(dtype).max) / 2 * (1 - error) <= largest <= float(jnp.finfo(dtype).max)
    wide, exact = np.asarray(found.wide(dtype, jnp.float32)), np.asarray(x, np.float32)
    normal = np.abs(exact) >= float(found.scale) * float(jnp.finfo(dtype).tiny)
    assert normal.mean() > 0.9 and (np.abs(wide - exact) <= error * np.abs(exact))[normal].all()


def test_zeros_stay_and_what_is_not_finite_is_not_hidden() -> None:
    zeros = scaled(jnp.zeros(3, jnp.bfloat16), FORWARD)
    assert not zeros.wide(FORWARD, jnp.float32).any()
    for bad in (np.inf, np.nan):
        assert not jnp.isfinite(
            scaled(jnp.asarray([1.0, bad], jnp.bfloat16), BACKWARD).wide(BACKWARD, jnp.float32)
        ).all()


@pytest.mark.parametrize("rows_out", [False, True])
def test_value_and_gradients_follow_those_of_the_product(rows_out: bool) -> None:
    """To the rounding of the factors: entries that are rounded by up to 1/16 or 1/8 add up as random walks do."""
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 64, 96), (96, 80), (2, 64, 80)))
    w = w.T if rows_out else w

    def gradients(w_of, x, w):
        y, back = jax.vjp(lambda x, w: linear(x, w_of(w), rows_out=rows_out), x, w)
        return y, *back(dy)

    ours = jax.jit(lambda x, w: gradients(Float8, x, w))(x, w)
    exact = gradients(lambda w: w, x, w)
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == jnp.bfloat16 and one.shape == other.shape
        difference = jnp.linalg.norm((one - other).astype(jnp.float32).ravel())
        assert 0.01 < difference / jnp.linalg.norm(other.astype(jnp.float32).ravel()) < 0.06


def test_it_is_the_same_where_the_backward_pass_computes_again() -> None:
    """jax rounds what a rematerialized function saves by the number of its bits, which would leave no e4m3 number over
    240: entries that all fill the range show it."""
    x, w = jnp.full((4, 16), 0.99, jnp.bfloat16), jnp.full((16, 8), -0.99, jnp.bfloat16)

    def loss(x, w):
        return jnp.sum(linear(jnp.tanh(linear(x, Float8(w))), Float8(w.T)).astype(jnp.float32))

    saved = jax.checkpoint(loss, policy=jax.checkpoint_policies.everything_saveable)
    plain, again = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, w) for f in (loss, saved))
    for one, other in zip(plain, again, strict=True):
        assert jnp.isfinite(one).all()
        np.testing.assert_array_equal(one, other)


def factors_in_8_bits(program: str) -> list[tuple[str | None, ...]]:
    """Of every `dot_general` in a StableHLO program, in order, the 8-bit types that its factors are converted from
    before they are scaled and reshaped; None for one that is not."""
    made: dict[str, str] = {}  # by the name of a value, which loops and functions give again, how the last one was made

    def source(value: str) -> str | None:
        line = made.get(value, "")
        if converted := re.search(r"convert .*x(f8\w+)>\)", line):
            return converted[1]
        moved = ("stablehlo.multiply", "stablehlo.reshape", "stablehlo.transpose")
        return source(re.findall(r"%\w+", line)[0]) if line.startswith(moved) else None

    found: list[tuple[str | None, ...]] = []
    for value, line in re.findall(r"(%\w+) = (.*)", program):
        made[value] = line
        if line.startswith("stablehlo.dot_general"):
            found.append(tuple(map(source, re.findall(r"%\w+", line)[:2])))
    return found


def test_every_factor_of_every_product_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On its way to each product stands a conversion from 8 bits, times a scale: what XLA makes one product of."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, w = jnp.ones((32, 48), jnp.bfloat16), jnp.ones((48, 16), jnp.bfloat16)
    value_and_gradients = jax.value_and_grad(lambda x, w: (linear(x, Float8(w)) ** 2).sum(), argnums=(0, 1))
    text = jax.jit(value_and_gradients).lower(x, w).as_text()
    assert sorted(map(sorted, factors_in_8_bits(text))) == [["f8E4M3FN", "f8E4M3FN"], *[["f8E4M3FN", "f8E5M2"]] * 2]
