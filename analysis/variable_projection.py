"""Approach 3 by variable projection: for given exponents E, A, B follow from non-negative least squares.

Only alpha and beta are searched, so there are no bad starts and no flat valleys (Golub & Pereyra 1973). The loss is
least squares in nats, which makes this an independent check of the robust log-loss fit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, nnls
from scipy.stats import t as student

from analysis.design import loss_gradient
from analysis.parametric import checked_runs
from analysis.surface import Surface
from analysis.uncertainty import Interval

EXPONENT_GRID = np.arange(0.05, 1.25, 0.1)


@dataclass(frozen=True)
class ProjectionFit:
    surface: Surface
    residual_sd: float  # nats, with 5 degrees of freedom removed; a run's noise
    runs: int
    covariance: np.ndarray  # (5, 5) of (E, ln A, ln B, alpha, beta)

    def interval(self, statistic: Callable[[Surface], float], level: float = 0.95) -> Interval:
        """Delta-method interval of a smooth statistic of the surface, with Student's t on runs - 5 degrees."""
        theta = _theta(self.surface)
        centre, steps = statistic(self.surface), 1e-5 * np.eye(5)
        gradient = [(statistic(_surface(theta + h)) - statistic(_surface(theta - h))) / 2e-5 for h in steps]
        se = float(np.sqrt(np.array(gradient) @ self.covariance @ np.array(gradient)))
        reach = float(student.ppf((1 + level) / 2, self.runs - 5)) * se
        return Interval(centre - reach, centre + reach, level, "delta")

    def prediction(self, params: float, tokens: float, level: float = 0.95) -> Interval:
        """Where the loss of one new run at (N, D) will fall, nats: what the surface leaves open and a run's noise."""
        surface = self.interval(lambda surface: surface.loss(params, tokens), level)
        centre, known = 0.5 * (surface.low + surface.high), 0.5 * (surface.high - surface.low)
        reach = float(np.hypot(known, student.ppf((1 + level) / 2, self.runs - 5) * self.residual_sd))
        return Interval(centre - reach, centre + reach, level, "prediction")


def fit_by_projection(params, tokens, loss, *, least_noise: float = 0.0) -> ProjectionFit:
    """Least squares in nats over alpha, beta in (0, 2); a run's noise is taken to be `least_noise` nats or more.

    Raises ValueError for fewer than 6 runs or bad values.
    """
    params, tokens, loss = checked_runs(params, tokens, loss)
    if len(loss) < 6:
        raise ValueError(f"the parametric fit has 5 parameters and needs at least 6 runs, got {len(loss)}: add runs")
    scales = np.exp([np.log(params).mean(), np.log(tokens).mean()])

    def project(exponents) -> tuple[np.ndarray, float]:
        columns = [np.ones_like(loss), (params / scales[0]) ** -exponents[0], (tokens / scales[1]) ** -exponents[1]]
        return nnls(np.stack(columns, axis=1), loss)

    def misfit(exponents) -> float:
        if min(exponents) <= 0 or max(exponents) > 2:
            return np.inf
        return project(exponents)[1]

    grid = [(alpha, beta) for alpha in EXPONENT_GRID for beta in EXPONENT_GRID]
    start = min(grid, key=misfit)
    options = {"xatol": 1e-10, "fatol": 1e-15, "maxiter": 2000, "maxfev": 4000}
    alpha, beta = minimize(misfit, start, method="Nelder-Mead", options=options).x
    (E, A, B), norm = project((alpha, beta))
    surface = Surface(float(E), float(A * scales[0] ** alpha), float(B * scales[1] ** beta), float(alpha), float(beta))
    residual_sd = max(norm / np.sqrt(len(loss) - 5), least_noise)
    return ProjectionFit(surface, residual_sd, len(loss), residual_sd**2 * _inverse_curvature(surface, params, tokens))


def _inverse_curvature(surface: Surface, params, tokens) -> np.ndarray:
    """(J^T J)^-1 of the losses with respect to (E, ln A, ln B, alpha, beta)."""
    jacobian = loss_gradient(surface, params, tokens)
    scale = np.linalg.norm(jacobian, axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    return np.linalg.pinv((jacobian / scale).T @ (jacobian / scale), rcond=1e-14) / np.outer(scale, scale)


def _theta(surface: Surface) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.array([surface.E, np.log(surface.A), np.log(surface.B), surface.alpha, surface.beta])


def _surface(theta) -> Surface:
    return Surface(theta[0], np.exp(theta[1]), np.exp(theta[2]), theta[3], theta[4])
