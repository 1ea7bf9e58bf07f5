"""The batched optimizer: derivatives against differences, lanes independent of each other, agreement with scipy."""

import numpy as np
import pytest
from scipy.optimize import minimize as scipy_minimize

from analysis.logsumexp import Terms, _Kernel, minimize


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 60))
    one, zero = np.ones(60), np.zeros(60)
    design = np.array([[one, zero, zero, -x, zero], [zero, one, zero, zero, -y], [zero, zero, one, zero, zero]])
    terms = Terms.of(design.transpose(0, 2, 1))
    truth = np.array([-1.0, -0.5, 0.6, 0.4, 0.3])
    return terms, truth, terms.log_sum(truth[None])[0] + rng.normal(0, 0.003, 60), rng


def test_gradient_and_hessian_match_differences(problem):
    terms, truth, log_loss, rng = problem
    kernel = _Kernel(terms, delta=0.5, width=1)  # wide enough that no residual crosses the corner
    weights = rng.uniform(0.5, 2.0, (1, 60))

    def at(theta):
        return kernel(theta[None], log_loss[None], weights)

    theta, step = truth + 0.1, 1e-5
    _, gradient, hessian, _ = at(theta)
    for i, h in enumerate(step * np.eye(5)):
        up, down = at(theta + h), at(theta - h)
        assert gradient[0, i] == pytest.approx((up[0][0] - down[0][0]) / (2 * step), rel=1e-6, abs=1e-9)
        assert hessian[0, i] == pytest.approx((up[1][0] - down[1][0]) / (2 * step), rel=1e-5, abs=1e-8)


def test_reaches_scipys_optimum_or_better(problem):
    terms, truth, log_loss, _ = problem

    def objective(theta, delta=1e-3):
        residual = np.abs(log_loss - terms.log_sum(theta[None])[0])
        return 1e3 * np.sum(np.where(residual < delta, residual**2 / 2, delta * (residual - delta / 2)))

    theirs = scipy_minimize(objective, truth, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000})
    ours = minimize(terms, log_loss, truth + 0.3, delta=1e-3)
    assert ours.converged_K.all()
    assert 1e3 * ours.objective_K[0] <= theirs.fun * (1 + 1e-9)


def test_a_lane_does_not_depend_on_its_neighbours(problem):
    terms, truth, log_loss, rng = problem
    starts = truth + rng.normal(0, 0.5, (40, 5))
    together = minimize(terms, log_loss, starts, delta=1e-3)
    alone = np.array([minimize(terms, log_loss, start, delta=1e-3).objective_K[0] for start in starts])
    assert together.objective_K == pytest.approx(alone, rel=1e-9)


def test_integer_weights_are_repeated_runs(problem):
    terms, truth, log_loss, rng = problem
    counts = rng.integers(0, 3, 60)
    repeated = np.repeat(np.arange(60), counts)
    weighted = minimize(terms, log_loss, truth, delta=1e-3, weights=counts)
    copied = minimize(Terms.of(terms.design_TRP[:, repeated]), log_loss[repeated], truth, delta=1e-3)
    assert weighted.theta_KP == pytest.approx(copied.theta_KP, rel=1e-6)


def test_one_row_of_losses_a_lane(problem):
    terms, truth, log_loss, rng = problem
    noisy = log_loss + rng.normal(0, 0.01, (3, 60))
    together = minimize(terms, noisy, np.tile(truth, (3, 1)), delta=1e-3)
    for lane in range(3):
        alone = minimize(terms, noisy[lane], truth, delta=1e-3)
        assert together.theta_KP[lane] == pytest.approx(alone.theta_KP[0], rel=1e-6)


def test_a_fixed_parameter_stays_and_the_rest_adapt(problem):
    terms, truth, log_loss, _ = problem
    free = minimize(terms, log_loss, truth, delta=1e-3)
    held = minimize(terms.fixing(3, truth[3] + 0.1), log_loss, np.delete(truth, 3), delta=1e-3)
    same = minimize(terms.fixing(3, free.theta_KP[0, 3]), log_loss, np.delete(truth, 3), delta=1e-3)
    assert held.objective_K[0] > free.objective_K[0]
    assert same.objective_K[0] == pytest.approx(free.objective_K[0], rel=1e-9)
