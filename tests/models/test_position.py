"""Positions against what the papers say, restated independently of the code."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.models.config import RopeConfig
from lmjax.models.position import alibi_slopes, rope_frequencies, rotate, rotation, sinusoidal

pytestmark = pytest.mark.usefixtures("quick_compilation")

LLAMA3 = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0)


@pytest.mark.parametrize(
    "cfg", [RopeConfig(), LLAMA3, RopeConfig(scaling="linear", factor=4.0)], ids=lambda c: c.scaling
)
def test_rotary_scores_depend_on_distance_alone(cfg: RopeConfig) -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))
    frequencies = rope_frequencies(cfg, 16, local=False)

    def score(query: int, key: int) -> float:
        at = [rotation(jnp.asarray([[position]]), frequencies) for position in (query, key)]
        return float(jnp.sum(rotate(q, at[0]) * rotate(k, at[1])))

    assert score(10, 3) == pytest.approx(score(110, 103), abs=1e-4)
    assert score(10, 10) == pytest.approx(float(jnp.sum(q * k)), abs=1e-4)
    assert abs(score(10, 3) - score(10, 4)) > 1e-2


def test_rotation_turns_pairs_of_halves_by_position_times_frequency() -> None:
    frequencies = rope_frequencies(RopeConfig(theta=100.0), 4, local=False)
    np.testing.assert_allclose(frequencies, [1.0, 0.1])
    x = jnp.asarray([1.0, 2.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    got = rotate(x, rotation(jnp.asarray([[3]]), frequencies)).ravel()
    expected = [math.cos(3), 2 * math.cos(0.3), math.sin(3), 2 * math.sin(0.3)]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_llama3_scaling_is_the_published_rule() -> None:
    """The rule of the Llama 3.1 reference code, by wavelength and case by case."""
    size, old_context = 128, 8192
    seen = set()
    for i, got in enumerate(rope_frequencies(LLAMA3, size, local=False)):
        plain = 1.0 / 500_000.0 ** (2 * i / size)
        wavelength = 2 * math.pi / plain
        if wavelength < old_context / 4.0:
            case, expected = "kept", plain
        elif wavelength > old_context / 1.0:
            case, expected = "stretched", plain / 8.0
        else:
            smooth = (old_context / wavelength - 1.0) / (4.0 - 1.0)
            case, expected = "blended", (1 - smooth) * plain / 8.0 + smooth * plain
        seen.add(case)
        assert got == pytest.approx(expected, rel=1e-12), (i, case)
    assert seen == {"kept", "blended", "stretched"}


def test_local_layers_have_their_own_base_and_no_scaling() -> None:
    cfg = RopeConfig(theta=1e6, local_theta=1e4, scaling="linear", factor=8.0)
    np.testing.assert_allclose(rope_frequencies(cfg, 4, local=False), [1 / 8, 1e-3 / 8])
    np.testing.assert_allclose(rope_frequencies(cfg, 4, local=True), [1, 1e-2])


def test_alibi_slopes_of_the_paper() -> None:
    np.testing.assert_allclose(alibi_slopes(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    every_other_of_16 = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    np.testing.assert_allclose(alibi_slopes(12), [*alibi_slopes(8), *every_other_of_16], rtol=1e-6)


@pytest.mark.parametrize("embed", [6, 7])
def test_sinusoids_are_the_papers_up_to_order(embed: int) -> None:
    got = sinusoidal(jnp.asarray([[0, 1, 50]]), embed)[0]
    half = (embed + 1) // 2
    for row, position in enumerate((0, 1, 50)):
        angles = [position / 10_000 ** (i / half) for i in range(half)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        np.testing.assert_allclose(got[row], expected[:embed], atol=1e-5)


def test_rotation_is_computed_in_float32() -> None:
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    by = rotation(jnp.asarray([[5000]]), rope_frequencies(RopeConfig(), 8, local=False))
    exact = rotate(x.astype(jnp.float32), by)
    assert rotate(x, by).dtype == jnp.bfloat16
    np.testing.assert_allclose(jax.device_get(rotate(x, by)).astype(np.float32), exact, atol=1e-2)
