"""Over-training and downstream error (Gadre et al. 2024, arXiv 2403.08540).

L(C, M) = E + (a M^eta + b M^-eta) C^-eta with M = D / N tokens per parameter (their eq. 4): the additive surface with
one exponent 2 eta for both N and D. Average top-1 error follows from loss: Err(L) = eps - k exp(-gamma L) (eq. 5).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import curve_fit, minimize_scalar, nnls

from analysis.parametric import checked_runs
from analysis.surface import Surface


@dataclass(frozen=True)
class ErrorLaw:
    """Err(L) = epsilon - k exp(-gamma L), a share between 0 and 1, with L in nats."""

    epsilon: float
    k: float
    gamma: float

    def __call__(self, loss):
        return self.epsilon - self.k * np.exp(-self.gamma * np.asarray(loss))


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
    """Least squares of Err(L) on runs with `loss` in nats and `error` in (0, 1), each (runs,).

    Raises ValueError for fewer than 4 runs or when no law of this form can be found.
    """
    loss, error = np.asarray(loss, dtype=np.float64), np.asarray(error, dtype=np.float64)
    if len(loss) < 4:
        raise ValueError(f"the error law has 3 parameters and needs at least 4 runs, got {len(loss)}: add runs")

    def law(x, epsilon, k, gamma):
        return epsilon - k * np.exp(-gamma * x)

    try:
        found, _ = curve_fit(law, loss, error, p0=(error.max(), 2.0, 1.0), maxfev=20000, xtol=1e-12, ftol=1e-12)
    except RuntimeError:
        raise ValueError("no law Err = eps - k exp(-gamma L) fits these runs: plot error against loss") from None
    return ErrorLaw(*(float(x) for x in found))


def overtraining_penalty(surface: Surface, flops, tokens_per_param):
    """Nats above the best loss that `flops` can buy when trained at M = D / N instead of the optimum."""
    params = np.sqrt(np.asarray(flops) / (6.0 * np.asarray(tokens_per_param)))
    return surface.loss(params, params * tokens_per_param) - surface.frontier_loss(flops)
