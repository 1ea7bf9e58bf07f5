"""Approach 2: exactness where the parabola is exact, and what it does with budgets it cannot trust."""

import numpy as np
import pytest

from analysis.isoflop import METHODS, assign_budgets, find_vertex, fit_isoflop, noise_replicates, optima
from analysis.power_law import fit_power_law
from analysis.simulate import EPOCH, HOFFMANN, Faults, simulate

SIZES = np.geomspace(1e8, 1e9, 7)


def parabola(vertex, bend=0.05):
    return 2.5 + bend * np.log(SIZES / vertex) ** 2


@pytest.mark.parametrize("surface", [EPOCH, HOFFMANN])
@pytest.mark.parametrize("method", METHODS)
def test_a_symmetric_grid_leaves_the_exponent_unbiased(surface, method):
    sweep = simulate(surface)
    fit = fit_isoflop(sweep.params, sweep.tokens, sweep.loss[0], sweep.budget, method=method)
    assert fit.params_law.exponent == pytest.approx(surface.params_exponent, abs=0.003)
    assert fit.tokens_law.exponent == pytest.approx(surface.tokens_exponent, abs=0.003)


def test_a_drifting_grid_biases_the_exponent():
    """The trap that the simulator is there to show: noise-free, and still wrong."""
    sweep = simulate(EPOCH, Faults(drift=3.0))
    fit = fit_isoflop(sweep.params, sweep.tokens, sweep.loss[0], sweep.budget)
    assert abs(fit.params_law.exponent - EPOCH.params_exponent) > 0.003


def test_an_exact_parabola_gives_its_vertex():
    vertex = find_vertex(1e20, SIZES, parabola(4e8), "parabola")
    assert vertex.used and not vertex.flag
    assert vertex.optimum == pytest.approx(4e8) and vertex.loss == pytest.approx(2.5)
    assert vertex.curvature == pytest.approx(0.1) and vertex.r2 == pytest.approx(1.0)
    assert vertex.offset == pytest.approx(np.log(4e8 / np.sqrt(1e17)))


@pytest.mark.parametrize(
    ("loss", "flag"),
    [
        (parabola(4e8, bend=-0.05), "concave"),
        (parabola(3e9), "optimum at the edge of the grid"),
        (parabola(2e7), "optimum at the edge of the grid"),
    ],
)
def test_untrustworthy_budgets_are_flagged_and_left_out(loss, flag):
    vertex = find_vertex(1e20, SIZES, loss, "parabola")
    assert vertex.flag == flag and not vertex.used


@pytest.mark.parametrize(("points", "flag"), [(2, "only 2 sizes"), (4, "only 4 sizes")])
def test_short_budgets_are_flagged(points, flag):
    vertex = find_vertex(1e20, SIZES[:points], parabola(1.5e8)[:points], "parabola")
    assert vertex.flag == flag and not vertex.used


def test_a_flagged_budget_does_not_move_the_law():
    sweep = simulate(EPOCH)
    last = sweep.budget == sweep.budget.max()
    loss = np.where(last, 5.0 - sweep.loss[0], sweep.loss[0])  # concave
    fit = fit_isoflop(sweep.params, sweep.tokens, loss, sweep.budget)
    without = fit_isoflop(*(x[~last] for x in (sweep.params, sweep.tokens, loss, sweep.budget)))
    assert [v.flag for v in fit.params_vertices if v.flag] == ["concave"]
    assert fit.params_law.exponent == pytest.approx(without.params_law.exponent)


def test_vertices_beyond_the_grid_take_part_when_asked():
    """As published fits do that use every row: the law of exact parabolas is exact, with intervals about it."""
    budgets, best = np.repeat([1e19, 1e20, 1e21], 7), np.repeat([2e8, 6e8, 1.8e9], 7)
    sizes = np.tile(SIZES, 3)
    loss = 2.5 + 0.05 * np.log(sizes / best) ** 2
    fit = fit_isoflop(sizes, budgets / (6 * sizes), loss, budgets, interior_only=False)
    assert [v.used for v in fit.params_vertices] == [True] * 3
    assert fit.params_law.exponent == pytest.approx(np.log10(3)) and fit.params_vertices[2].flag
    copies = noise_replicates(sizes, budgets / (6 * sizes), loss, budgets, fit, noise_sd=1e-4, replicates=50, seed=0)
    assert np.isfinite(copies.params_optima).all()
    assert copies.params_law.exponent == pytest.approx(fit.params_law.exponent, abs=0.01)


def test_one_budget_is_refused_in_one_line():
    sweep = simulate(EPOCH, budgets=(1e20,))
    with pytest.raises(ValueError, match="at least two budgets with an interior optimum, got 1"):
        fit_isoflop(sweep.params, sweep.tokens, sweep.loss[0], sweep.budget)


def test_an_unknown_method_is_refused():
    sweep = simulate(EPOCH)
    with pytest.raises(ValueError, match="unknown isoFLOP method 'spline': choose one of"):
        fit_isoflop(sweep.params, sweep.tokens, sweep.loss[0], sweep.budget, method="spline")


@pytest.mark.parametrize("method", METHODS)
def test_replicates_are_found_like_single_curves(method):
    rng = np.random.default_rng(0)
    losses = parabola(4e8) + rng.normal(0, 0.01, (5, 7))
    together = optima(np.log(SIZES), losses, method)
    alone = [optima(np.log(SIZES), loss[None], method) for loss in losses]
    assert together[0] == pytest.approx(np.array([a[0][0] for a in alone]), nan_ok=True)


def test_noise_widens_the_replicates_in_proportion():
    sweep = simulate(EPOCH)
    columns = (sweep.params, sweep.tokens, sweep.loss[0], sweep.budget)
    fit = fit_isoflop(*columns)
    spread = [
        noise_replicates(*columns, fit, noise_sd=sd, replicates=400, seed=0).params_law.exponent.std()
        for sd in (0.001, 0.003)
    ]
    assert spread[1] / spread[0] == pytest.approx(3.0, rel=0.15)


def test_budgets_are_found_in_scattered_flops():
    rng = np.random.default_rng(0)
    labels = np.repeat([6e18, 3e19, 1e20], 8)
    found = assign_budgets(labels * rng.uniform(0.97, 1.03, 24))
    assert len(np.unique(found)) == 3 and found == pytest.approx(labels, rel=0.03)
    assert np.isnan(assign_budgets([1e18], budgets=[6e18]))[0]


def test_power_laws_ignore_missing_points_and_report_their_error():
    x = np.geomspace(1e18, 1e22, 9)
    y = np.stack([3 * x**0.5, 7 * x**0.4])
    y[1, 3] = np.nan
    law = fit_power_law(x, y)
    assert law.exponent == pytest.approx([0.5, 0.4])
    assert law(1e23)[1] == pytest.approx(7 * 1e23**0.4)
    with pytest.raises(ValueError, match="two distinct budgets"):
        fit_power_law([1e20, 1e20], [1.0, 2.0])
