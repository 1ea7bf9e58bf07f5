"""Approach 1 on simulated curves."""

import numpy as np
import pytest

from analysis.envelope import curves_on_grid, fit_envelope, smooth
from analysis.power_law import fit_power_law
from analysis.simulate import EPOCH, HOFFMANN, simulate_curves

SIZES = np.geomspace(3e7, 1e10, 18)


def curves_of(surface):
    curves = simulate_curves(surface, SIZES, SIZES * 200)
    _, grid, on_grid = curves_on_grid(curves["run"], curves["flops"], curves["loss"])
    return grid, on_grid


@pytest.mark.parametrize("surface", [EPOCH, HOFFMANN])
def test_exponents_without_noise(surface):
    fit = fit_envelope(SIZES, *curves_of(surface))
    assert fit.params_law.exponent == pytest.approx(surface.params_exponent, abs=0.003)
    assert fit.tokens_law.exponent == pytest.approx(surface.tokens_exponent, abs=0.003)


def test_all_points_of_a_staircase_give_too_flat_a_line():
    fit = fit_envelope(SIZES, *curves_of(EPOCH))
    inside = (fit.winner > SIZES.min()) & (fit.winner < SIZES.max())
    naive = fit_power_law(fit.flops[inside], fit.winner[inside]).exponent
    stairs = len(fit.stair_params)
    assert naive / fit.params_law.exponent == pytest.approx(1 - 1 / stairs**2, abs=1e-3)


def test_the_envelope_is_below_every_curve():
    grid, on_grid = curves_of(EPOCH)
    fit = fit_envelope(SIZES, grid, on_grid)
    assert (fit.loss <= on_grid[:, np.isfinite(on_grid).any(axis=0)].min(axis=0)).all()


def test_too_few_sizes_are_refused():
    grid, on_grid = curves_of(EPOCH)
    with pytest.raises(ValueError, match="add sizes or train longer"):
        fit_envelope(SIZES[:4], grid, on_grid[:4])


def test_smoothing_keeps_straight_lines_and_averages_noise():
    line = np.linspace(5.0, 3.0, 400)
    assert smooth(line) == pytest.approx(line)
    noise = np.random.default_rng(0).normal(0, 1, 4000)
    assert smooth(noise)[1000:3000].std() < 0.15
