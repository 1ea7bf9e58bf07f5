"""Over-training and downstream error (Gadre et al. 2024, arXiv 2403.08540).

L(C, M) = E + (a M^eta + b M^-eta) C^-eta with M = D / N tokens per parameter (their eq. 4): the additive surface with
one exponent 2 eta for both N and D. Average top-1 error follows from loss: Err(L) = eps - k exp(-gamma L) (eq. 5).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar, nnls

from analysis.parametric import checked_runs
from analysis.surface import Surface


@dataclass(frozen=True)
class ErrorLaw:
    """Err(L) = epsilon - k exp(-gamma L), a share between 0 and 1. Fields may be arrays, one entry a replicate."""

    epsilon: np.ndarray | float
    k: np.ndarray | float
    gamma: np.ndarray | float

    def __call__(self, loss):
        """Err at `loss`; replicates go along the first axis of the result."""
        epsilon, k, gamma = (np.expand_dims(x, -1) if np.ndim(x) else x for x in (self.epsilon, self.k, self.gamma))
        return epsilon - k * np.exp(-gamma * np.asarray(loss))


def fit_overtraining(params, tokens, loss) -> Surface:
    """Least squares in nats of the surface with alpha = beta = 2 eta in (0.02, 2), other coefficients non-negative.

    Raises ValueError for fewer than 5 runs or values that are not positive.
    """
    params, tokens, loss = checked_runs(params, tokens, loss)
    if len(loss) < 5:
        raise ValueError(f"the over-training law has 4 parameters and needs at least 5 runs, got {len(loss)}: add runs")
    scales = np.exp([np.log(params).mean(), np.log(tokens).mean()])

    def project(exponent):
        columns = [np.ones_like(loss), (params / scales[0]) ** -exponent, (tokens / scales[1]) ** -exponent]
        return nnls(np.stack(columns, axis=1), loss)

    grid = np.geomspace(0.02, 2.0, 60)
    best = int(np.argmin([project(exponent)[1] for exponent in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    exponent = minimize_scalar(lambda x: project(x)[1], bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    E, A, B = project(exponent)[0]
    return Surface(
        float(E), float(A * scales[0] ** exponent), float(B * scales[1] ** exponent), float(exponent), float(exponent)
    )


def fit_error_law(loss, error) -> ErrorLaw:
    """Least squares of Err(L) on runs with `loss` and `error` in (0, 1), each (runs,), with gamma > 0.

    For a given gamma the law is linear, so only gamma is searched. Raises ValueError for fewer than 4 runs, errors that
    are no shares, or when error does not fall with loss.
    """
    loss, error = np.asarray(loss, dtype=np.float64), np.asarray(error, dtype=np.float64)
    if len(loss) < 4:
        raise ValueError(f"the error law has 3 parameters and needs at least 4 runs, got {len(loss)}: add runs")
    if not ((error > 0) & (error < 1)).all():
        raise ValueError(f"errors must be shares between 0 and 1, and go from {error.min():.3g} to {error.max():.3g}")
    span = np.ptp(loss)
    if not span > 0:
        raise ValueError("the error law needs runs of different losses: add runs")

    def misfit(log_gamma: float) -> float:
        return float(np.sum((_error_law_at(np.exp(log_gamma), loss, error)(loss) - error) ** 2))

    # From a straight line over the span of the losses to a step at its lower end.
    grid = np.linspace(np.log(0.01 / span), np.log(100.0 / span), 60)
    best = int(np.argmin([misfit(x) for x in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    log_gamma = minimize_scalar(misfit, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x
    law = _error_law_at(float(np.exp(log_gamma)), loss, error)
    if not law.k > 0:
        raise ValueError("error does not rise with loss: check the columns, and plot one against the other")
    return law


def _error_law_at(gamma: float, loss, error) -> ErrorLaw:
    """The best law of this gamma."""
    lowest = loss.min()
    fall = np.exp(-gamma * (loss - lowest))
    epsilon, slope = np.linalg.lstsq(np.stack([np.ones_like(loss), -fall], axis=1), error, rcond=None)[0]
    with np.errstate(over="ignore"):
        return ErrorLaw(float(epsilon), float(slope * np.exp(gamma * lowest)), gamma)


def resample_error_law(loss, error, law: ErrorLaw, *, replicates: int, seed: int) -> ErrorLaw:
    """The law refitted to its values plus residuals drawn with replacement; fields are (replicates,).

    Residuals are scaled by sqrt(runs / (runs - 3)), as fitting shrinks them (Efron & Tibshirani 1993, 9.3).
    """
    loss, error = np.asarray(loss, dtype=np.float64), np.asarray(error, dtype=np.float64)
    residuals = (error - law(loss)) * np.sqrt(len(loss) / (len(loss) - 3))
    rng, laws = np.random.default_rng(seed), []
    for _ in range(replicates):
        drawn = np.clip(law(loss) + rng.choice(residuals, len(loss)), 1e-6, 1 - 1e-6)
        try:
            laws.append(fit_error_law(loss, drawn))
        except ValueError:
            continue  # a draw in which error does not rise with loss
    if len(laws) < replicates / 2:
        raise ValueError("error hardly follows loss in these runs: no error law; plot one against the other")
    return ErrorLaw(*(np.array([getattr(each, name) for each in laws]) for name in ("epsilon", "k", "gamma")))


def overtraining_penalty(surface: Surface, flops, tokens_per_param):
    """Nats above the best loss that `flops` can buy when trained at M = D / N instead of the optimum."""
    params = np.sqrt(np.asarray(flops) / (6.0 * np.asarray(tokens_per_param)))
    return surface.loss(params, params * tokens_per_param) - surface.frontier_loss(flops)
