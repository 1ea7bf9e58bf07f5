"""Closed forms of the surface against brute force."""

import numpy as np
import pytest

from analysis.design import exponent_gradient, log_params_gradient
from analysis.inference import inference_optimum
from analysis.overtraining import overtraining_penalty
from analysis.simulate import ASYMMETRIC, EPOCH, HOFFMANN
from analysis.surface import Surface


@pytest.mark.parametrize("surface", [EPOCH, HOFFMANN, ASYMMETRIC])
def test_the_optimum_spends_the_budget_and_nothing_beats_it(surface):
    flops = 3e22
    params, tokens = surface.optimum(flops)
    assert 6 * params * tokens == pytest.approx(flops, rel=1e-12)
    others = params * np.geomspace(0.1, 10, 2001)
    assert surface.frontier_loss(flops) <= surface.loss(others, flops / (6 * others)).min() + 1e-12


def test_tokens_at_a_loss_invert_the_surface():
    assert EPOCH.loss(1e9, EPOCH.tokens_at(1e9, 2.4)) == pytest.approx(2.4)
    assert np.isnan(EPOCH.tokens_at(1e6, 2.0))


def test_gradients_of_exponent_and_optimum_match_differences():
    theta = np.array([EPOCH.E, np.log(EPOCH.A), np.log(EPOCH.B), EPOCH.alpha, EPOCH.beta])

    def surface(t):
        return Surface(t[0], np.exp(t[1]), np.exp(t[2]), t[3], t[4])

    for gradient, statistic in (
        (exponent_gradient(EPOCH), lambda s: s.params_exponent),
        (log_params_gradient(EPOCH, 1e24), lambda s: np.log(s.optimum(1e24)[0])),
    ):
        steps = 1e-6 * np.eye(5)
        difference = [(statistic(surface(theta + h)) - statistic(surface(theta - h))) / 2e-6 for h in steps]
        assert gradient == pytest.approx(difference, rel=1e-5, abs=1e-7)


def test_serving_more_tokens_means_a_smaller_model_trained_longer():
    loss = float(EPOCH.frontier_loss(1e22))
    models = [inference_optimum(EPOCH, loss, served) for served in (1e6, 1e11, 1e13)]
    assert models[0].params == pytest.approx(EPOCH.optimum(1e22)[0], rel=1e-3)
    assert models[0].params > models[1].params > models[2].params
    assert models[0].tokens < models[1].tokens < models[2].tokens
    for model in models:
        assert EPOCH.loss(model.params, model.tokens) == pytest.approx(loss)


def test_no_neighbour_of_the_inference_optimum_is_cheaper():
    loss, served = 2.3, 1e12
    model = inference_optimum(EPOCH, loss, served)
    for factor in (0.97, 1.03):
        params = model.params * factor
        cost = 6 * params * EPOCH.tokens_at(params, loss) + 2 * params * served
        assert cost > model.total_flops


def test_a_loss_below_the_irreducible_one_is_refused():
    with pytest.raises(ValueError, match="not above the irreducible loss"):
        inference_optimum(EPOCH, 1.5, 1e12)


def test_overtraining_costs_nothing_at_the_optimum_and_something_elsewhere():
    params, tokens = EPOCH.optimum(1e21)
    assert overtraining_penalty(EPOCH, 1e21, tokens / params) == pytest.approx(0.0, abs=1e-12)
    assert overtraining_penalty(EPOCH, 1e21, 50 * tokens / params) > 0.01
