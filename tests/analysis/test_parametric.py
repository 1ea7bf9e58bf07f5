"""Approach 3 on surfaces whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.parametric import fit_least_absolute_deviations, fit_parametric, standard_starts
from analysis.simulate import ASYMMETRIC, EPOCH, HOFFMANN, STANDARD_BUDGETS, Faults, simulate
from analysis.surface import Surface
from analysis.variable_projection import fit_by_projection

SURFACES = {"epoch": EPOCH, "hoffmann": HOFFMANN, "asymmetric": ASYMMETRIC}


@pytest.mark.parametrize("name", SURFACES)
@pytest.mark.parametrize("fit", [fit_parametric, fit_by_projection])
def test_noise_free_surfaces_are_recovered(name, fit):
    truth, sweep = SURFACES[name], simulate(SURFACES[name])
    found = fit(sweep.params, sweep.tokens, sweep.loss[0]).surface
    assert found.alpha == pytest.approx(truth.alpha, abs=1e-3)
    assert found.beta == pytest.approx(truth.beta, abs=1e-3)
    far = 100 * max(STANDARD_BUDGETS)
    assert found.optimum(far)[0] == pytest.approx(truth.optimum(far)[0], rel=0.01)


@settings(max_examples=15, deadline=None)
@given(
    E=st.floats(1.4, 2.2),
    alpha=st.floats(0.2, 0.6),
    beta=st.floats(0.2, 0.6),
    from_size=st.floats(0.1, 0.6),
    from_data=st.floats(0.1, 0.6),
)
def test_any_reasonable_surface_is_recovered(E, alpha, beta, from_size, from_data):
    truth = Surface(E, from_size * 1e9**alpha, from_data * 2e10**beta, alpha, beta)
    sweep = simulate(truth)
    found = fit_parametric(sweep.params, sweep.tokens, sweep.loss[0], starts=standard_starts()[::97]).surface
    assert (found.alpha, found.beta) == pytest.approx((alpha, beta), abs=1e-3)


def test_every_start_converges_and_most_agree():
    sweep = simulate(EPOCH, Faults(noise_sd=0.003))
    fit = fit_parametric(sweep.params, sweep.tokens, sweep.loss[0])
    assert fit.starts == 4500 and fit.converged == 1.0 and fit.agreeing > 0.5


def test_units_do_not_matter():
    sweep = simulate(EPOCH, Faults(noise_sd=0.003))
    base = fit_parametric(sweep.params, sweep.tokens, sweep.loss[0], starts=standard_starts()[::50])
    scaled = fit_parametric(sweep.params / 1e6, sweep.tokens / 1e9, sweep.loss[0], starts=standard_starts()[::50])
    assert scaled.surface.alpha == pytest.approx(base.surface.alpha, rel=1e-6)
    assert scaled.surface.A * 1e6**base.surface.alpha == pytest.approx(base.surface.A, rel=1e-4)


def test_least_absolute_deviations_ignore_one_wild_run():
    sweep = simulate(EPOCH)
    loss = sweep.loss[0].copy()
    loss[10] *= 1.5
    fit = fit_least_absolute_deviations(sweep.params, sweep.tokens, loss, starts=standard_starts()[::50])
    assert fit.surface.alpha == pytest.approx(EPOCH.alpha, abs=1e-4)


@pytest.mark.parametrize("bad", [np.nan, 0.0, -2.0, np.inf])
@pytest.mark.parametrize("column", ["params", "tokens", "loss"])
def test_bad_values_are_refused_by_name(bad, column):
    sweep = simulate(EPOCH)
    columns = {"params": sweep.params.copy(), "tokens": sweep.tokens.copy(), "loss": sweep.loss[0].copy()}
    columns[column][5] = bad
    with pytest.raises(ValueError, match=f"{column} must be finite and positive: run 5"):
        fit_parametric(**columns)


def test_too_few_runs_are_refused():
    sweep = simulate(EPOCH)
    with pytest.raises(ValueError, match="at least 6 runs, got 5"):
        fit_parametric(sweep.params[:5], sweep.tokens[:5], sweep.loss[0, :5])
