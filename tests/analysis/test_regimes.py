"""Laws beyond the compute optimum, on data simulated from them."""

import numpy as np
import pytest

from analysis.extrapolation import hold_out, hold_outs
from analysis.hyperparameters import find_optima, fit_hyperparameter_law
from analysis.kaplan import KaplanFit, fit_kaplan
from analysis.overtraining import fit_error_law, fit_overtraining
from analysis.repeats import PenaltyFit, effective_loss, effective_tokens, fit_effective_data, fit_penalty
from analysis.simulate import EPOCH, Faults, simulate
from analysis.surface import Surface

PARAMS = np.repeat(np.geomspace(5e7, 3e9, 8), 6)
UNIQUE = np.repeat([1e8, 5e8, 2e9, 1e10], 12)
TOKENS = UNIQUE * np.tile([1, 2, 4, 8, 16, 40], 8)


def test_effective_tokens_saturate_at_the_half_life():
    assert effective_tokens(1e9, 1e9, 15.0) == 1e9
    assert effective_tokens(2e9, 1e9, 15.0) == pytest.approx(1.97e9, rel=0.005)  # one repeat is nearly as good as new
    assert effective_tokens(1e13, 1e9, 15.0) == pytest.approx(16e9, rel=1e-6)


def test_unrepeated_data_are_the_plain_surface():
    params, tokens = EPOCH.optimum(1e21)
    assert effective_loss(EPOCH, params, tokens, tokens * 2, 15.0, 5.0) == pytest.approx(EPOCH.loss(params, tokens))


def test_half_lives_are_recovered_inside_their_profiles():
    noise = np.exp(np.random.default_rng(0).normal(0, 0.001, 48))
    fit = fit_effective_data(
        EPOCH, PARAMS, TOKENS, UNIQUE, effective_loss(EPOCH, PARAMS, TOKENS, UNIQUE, 15.4, 5.3) * noise
    )
    assert fit.data_half_life == pytest.approx(15.4, rel=0.05) and 15.4 in fit.data_interval
    assert fit.params_half_life == pytest.approx(5.3, rel=0.05) and 5.3 in fit.params_interval
    assert fit.residual_sd == pytest.approx(0.001, rel=0.3)


def diverged_losses(seed: int = 0) -> np.ndarray:
    """R_D* = 15.4 and R_N* = 5.3, but the smallest sets' many epochs end 5% too high."""
    noise = np.random.default_rng(seed).normal(0, 0.001, 48) + np.where(TOKENS / UNIQUE >= 40, 0.05 * (UNIQUE < 1e9), 0)
    return effective_loss(EPOCH, PARAMS, TOKENS, UNIQUE, 15.4, 5.3) * np.exp(noise)


def test_few_diverged_runs_move_the_huber_fit_less_than_least_squares():
    squares, robust = (
        fit_effective_data(EPOCH, PARAMS, TOKENS, UNIQUE, diverged_losses(), delta=delta) for delta in (None, 1e-3)
    )
    assert abs(np.log(robust.data_half_life / 15.4)) < abs(np.log(squares.data_half_life / 15.4)) / 2
    assert robust.delta == 1e-3 and squares.delta is None


@pytest.mark.parametrize("delta", [None, 1e-3])
def test_profiles_of_both_fits_hold_the_truth_where_noise_is_uneven(delta):
    """Noise that grows with the epochs and is shared by a cell, as that of diverging runs is."""
    held = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        cell = np.repeat(rng.normal(0, 0.01, 8), 6)
        noise = cell * np.log(TOKENS / UNIQUE) / 3 + rng.normal(0, 0.001, 48)
        loss = effective_loss(EPOCH, PARAMS, TOKENS, UNIQUE, 15.4, 5.3) * np.exp(noise)
        fit = fit_effective_data(EPOCH, PARAMS, TOKENS, UNIQUE, loss, delta=delta)
        assert fit.data_half_life in fit.data_interval
        held.append(15.4 in fit.data_interval)
    assert sum(held) >= 6


def test_an_unidentified_half_life_has_no_upper_end():
    """With two epochs at most and coarse noise, nothing says when repeats stop helping."""
    few = TOKENS <= 2 * UNIQUE
    noise = np.exp(np.random.default_rng(1).normal(0, 0.02, few.sum()))
    loss = effective_loss(EPOCH, PARAMS[few], TOKENS[few], UNIQUE[few], 15.4, 5.3) * noise
    fit = fit_effective_data(EPOCH, PARAMS[few], TOKENS[few], UNIQUE[few], loss)
    assert fit.data_interval.high == np.inf


def test_the_additive_penalty_is_recovered_and_can_turn_the_loss_up():
    truth = PenaltyFit(EPOCH, 0.05, 1.3, 0.6, 0.0)
    fit = fit_penalty(EPOCH, PARAMS, TOKENS, UNIQUE, truth.loss(PARAMS, TOKENS, UNIQUE))
    assert (fit.scale, fit.repeats_exponent, fit.ratio_exponent) == pytest.approx((0.05, 1.3, 0.6), rel=1e-3)
    losses = fit.loss(3e9, 5e8 * np.array([1, 4, 40]), 5e8)
    assert losses[2] > losses[1]


@pytest.mark.parametrize("fit", [fit_effective_data, fit_penalty])
def test_tables_without_repeats_are_refused(fit):
    with pytest.raises(ValueError, match="0 runs repeat data"):
        fit(EPOCH, PARAMS, UNIQUE, UNIQUE, EPOCH.loss(PARAMS, UNIQUE))


def test_kaplans_form_is_recovered():
    truth = KaplanFit(0.076, 0.103, np.log(6.4e13), np.log(1.8e13), 0.0)
    sweep = simulate(EPOCH)
    fit = fit_kaplan(sweep.params, sweep.tokens, truth.loss(sweep.params, sweep.tokens))
    assert (fit.alpha_n, fit.alpha_d) == pytest.approx((0.076, 0.103), rel=1e-5)
    assert (fit.log_n_c, fit.log_d_c) == pytest.approx((truth.log_n_c, truth.log_d_c), rel=1e-5)


def test_overtraining_law_and_error_law_are_recovered():
    truth, sweep = Surface(1.8, 120.0, 190.0, 0.25, 0.25), simulate(EPOCH)
    fit = fit_overtraining(sweep.params, sweep.tokens, truth.loss(sweep.params, sweep.tokens))
    assert (fit.E, fit.alpha) == pytest.approx((1.8, 0.25), abs=1e-4)
    loss = np.linspace(2.2, 4.0, 8)
    law = fit_error_law(loss, 0.85 - 2.0 * np.exp(-0.8 * loss))
    assert (law.epsilon, law.k, law.gamma) == pytest.approx((0.85, 2.0, 0.8), rel=1e-5)


def test_learning_rate_law_is_recovered_and_edges_are_left_out():
    params = np.repeat(np.geomspace(1e7, 1e9, 4), 15)
    tokens = np.tile(np.repeat([1e9, 4e9, 1.6e10], 5), 4)
    best = 0.3 * params**-0.2 * tokens**0.1
    tried = best * np.tile([0.25, 0.5, 1.0, 2.0, 4.0], 12)
    loss = 2.5 + 0.02 * np.log(tried / best) ** 2
    law = fit_hyperparameter_law(params, tokens, tried, loss)
    assert (law.params_exponent, law.tokens_exponent) == pytest.approx((-0.2, 0.1), abs=1e-6)
    loss[:5] = [2.5, 2.6, 2.7, 2.8, 2.9]
    cells = find_optima(params, tokens, tried, loss)
    assert [cell.flag for cell in cells].count("optimum at the edge of the values tried") == 1


def tried_batches():
    """Batches about Step Law's optimum in D (arXiv 2503.04715), five of eight within 0.25% of the best."""
    cells = [(n, d) for n in (1e8, 3e8, 1e9) for d in (1e9, 4e9, 1.6e10, 6.4e10)]
    tried = [(n, d, off) for n, d in cells for off in np.arange(-3, 5) * np.log(2) / 2]
    params, tokens, off = np.array(tried).T
    loss = 2.5 * (1 + 0.004 * off**2)
    return params, tokens, 0.58 * tokens**0.571 * np.exp(off), loss


def test_a_batch_law_of_tokens_alone_is_recovered_pooled_and_by_cells():
    columns = tried_batches()
    pooled, means = (fit_hyperparameter_law(*columns, regressors=["tokens"], pooled=p) for p in (True, False))
    for law in (pooled, means):
        assert law.tokens_exponent == pytest.approx(0.571, abs=1e-6) and law.params_exponent == 0
        assert law.regressors == "D"
    near = [cell for cell in pooled.cells if not cell.flag]
    assert len(near) == 12 and {len(cell.near) for cell in near} == {5}
    assert pooled(1e9, 1e11) == pytest.approx(means(1e9, 1e11))


def test_a_flat_cell_weighs_by_its_near_optimal_settings_when_pooled():
    params, tokens, batch, loss = tried_batches()
    flat = (params == 1e9) & (batch > 0.58 * tokens**0.571)
    loss[flat] = 2.5 + (loss[flat] - 2.5) / 4  # all larger batches are near-optimal there
    pooled, means = (
        fit_hyperparameter_law(params, tokens, batch, loss, regressors=["tokens"], pooled=p) for p in (True, False)
    )
    assert pooled(1e9, 1e10) > means(1e9, 1e10)
    wide = fit_hyperparameter_law(params, tokens, batch, loss, regressors=["tokens"], pooled=True, tolerance=0.01)
    assert sum(len(cell.near) for cell in wide.cells) > sum(len(cell.near) for cell in pooled.cells)


def test_near_optimal_settings_of_a_cell_are_no_evidence_of_their_own():
    """Every run listed four times leaves the pooled law's interval as it was, but for the small-sample factor."""
    params, tokens, batch, loss = tried_batches()
    batch = batch * np.exp(np.repeat(np.random.default_rng(0).normal(0, 0.2, 12), 8))  # each cell's own luck
    once, often = (
        fit_hyperparameter_law(*(np.repeat(x, times) for x in (params, tokens, batch, loss)), pooled=True)
        for times in (1, 4)
    )
    assert often.interval(1e9, 1e11).high == pytest.approx(once.interval(1e9, 1e11).high, rel=0.02)


def test_a_single_cell_makes_no_law():
    with pytest.raises(ValueError, match="too few for a law"):
        fit_hyperparameter_law(np.full(5, 1e8), np.full(5, 1e9), np.geomspace(1e-4, 1e-2, 5), [3, 2.9, 2.8, 2.9, 3])


def test_hold_outs_see_a_surface_that_bends():
    sweep = simulate(EPOCH)
    clean = hold_out(sweep.params, sweep.tokens, sweep.loss[0], 3e20)
    assert clean.max_error < 1e-3 and clean.held_out + clean.trained == 63
    bent = sweep.loss[0] + np.where(6 * sweep.params * sweep.tokens > 4e20, 0.05, 0.0)
    assert hold_out(sweep.params, sweep.tokens, bent, 3e20).mean_error > 0.01
    with pytest.raises(ValueError, match="runs to fit"):
        hold_out(sweep.params, sweep.tokens, sweep.loss[0], 1e18)
    assert 1 <= len(hold_outs(sweep.params, sweep.tokens, sweep.loss[0])) <= 4


@pytest.mark.parametrize("faults", [Faults(mistuning=0.02), Faults(wrong_horizon=0.02)])
def test_faults_of_a_sweep_move_the_exponent(faults):
    """What noise intervals cannot know: systematic faults bias the fit even without noise."""
    from analysis.variable_projection import fit_by_projection

    sweep = simulate(EPOCH, faults)
    found = fit_by_projection(sweep.params, sweep.tokens, sweep.loss[0]).surface
    assert abs(found.params_exponent - EPOCH.params_exponent) > 0.01
