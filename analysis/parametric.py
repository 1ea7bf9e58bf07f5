"""Approach 3: fit L(N, D) = E + A / N^alpha + B / D^beta to runs, from many starts, with a robust loss on log L.

Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3) minimize the sum over runs of Huber(delta = 1e-3) of
log L - LSE(a - alpha ln N, b - beta ln D, e) from a grid of starts. Their optimizer stopped early (Besiroglu et al.
2024, arXiv 2404.10102), whose own headline numbers are a least-absolute-deviation fit. Both losses are offered here
and the result says which one it is.
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from analysis.logsumexp import Minima, Terms, minimize
from analysis.surface import Surface

HUBER_DELTA = 1e-3
# Least absolute deviations is reached from the Huber optimum through ever sharper corners; at the last one the two
# objectives differ by less than rounding of the losses.
LAD_DELTAS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
# A start agrees with the best when its objective is within this relative distance.
AGREEMENT = 1e-9
# Beyond this (in logarithms, or as an exponent) a parameter has run away: the data hold no such law.
LARGEST_PARAMETER = 1e3
PARAMETERS = ("a", "b", "e", "alpha", "beta")


@dataclass(frozen=True)
class ParametricFit:
    """A fitted surface and the evidence that the optimizer found the optimum."""

    surface: Surface
    objective: float  # sum over runs of the robust loss of the log-loss residuals
    delta: float  # corner of the Huber loss; below 1e-8 the fit is least absolute deviations
    runs: int
    starts: int
    agreeing: float  # share of starts that end within a relative 1e-9 of the best objective
    converged: float  # share of starts whose descent converged
    condition: float  # condition number of the curvature at the optimum, in centred coordinates
    log_residuals: np.ndarray  # (runs,) ln L - ln L_fit

    @property
    def loss_name(self) -> str:
        return "least absolute deviations" if self.delta <= 1e-8 else f"Huber(delta={self.delta:g})"


@dataclass(frozen=True)
class CentredRuns:
    """Log-space data about its centre, where the five parameters are far less correlated."""

    terms: Terms
    log_loss_R: np.ndarray
    centre: tuple[float, float]

    @classmethod
    def of(cls, params, tokens, loss) -> "CentredRuns":
        log_params, log_tokens, log_loss = (np.log(x) for x in checked_runs(params, tokens, loss))
        centre = (float(log_params.mean()), float(log_tokens.mean()))
        one, zero = np.ones_like(log_params), np.zeros_like(log_params)
        design = [
            [one, zero, zero, centre[0] - log_params, zero],
            [zero, one, zero, zero, centre[1] - log_tokens],
            [zero, zero, one, zero, zero],
        ]
        return cls(Terms.of(np.array(design).transpose(0, 2, 1)), log_loss, centre)

    def centred(self, theta_KP: np.ndarray) -> np.ndarray:
        """(a, b, e, alpha, beta) of the published form -> the same about the centre."""
        theta = np.array(theta_KP, dtype=np.float64)
        theta[..., 0] -= theta[..., 3] * self.centre[0]
        theta[..., 1] -= theta[..., 4] * self.centre[1]
        return theta

    def surface(self, theta: np.ndarray) -> Surface:
        """Surface of centred parameters (5,) or (K, 5)."""
        a, b, e, alpha, beta = np.moveaxis(np.asarray(theta), -1, 0)
        with np.errstate(over="ignore"):
            A, B = np.exp(a + alpha * self.centre[0]), np.exp(b + beta * self.centre[1])
        fields = (np.exp(e), A, B, alpha, beta)
        return Surface(*(float(x) if x.ndim == 0 else x for x in fields))

    def theta(self, surface: Surface) -> np.ndarray:
        """Centred parameters of a surface."""
        published = [np.log(surface.A), np.log(surface.B), np.log(surface.E), surface.alpha, surface.beta]
        return self.centred(np.stack(np.broadcast_arrays(*published), axis=-1))


def checked_runs(params, tokens, loss) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three columns as float64 arrays. Raises ValueError for unequal lengths or values that are not positive."""
    columns = [np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (params, tokens, loss)]
    if len({column.shape for column in columns}) != 1:
        raise ValueError(f"params, tokens and loss differ in length: {[len(column) for column in columns]}")
    for name, column in zip(("params", "tokens", "loss"), columns, strict=True):
        bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
        if len(bad):
            raise ValueError(
                f"{name} must be finite and positive: run {bad[0]} has {column[bad[0]]:g} ({len(bad)} such runs); "
                "drop or repair them"
            )
    return columns[0], columns[1], columns[2]


def standard_starts() -> np.ndarray:
    """The 4500 starts (a, b, e, alpha, beta) of Hoffmann et al. 2022, appendix D.3, (4500, 5)."""
    log_coefficients, exponents = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0), (0.0, 0.5, 1.0, 1.5, 2.0)
    grid = product(log_coefficients, log_coefficients, (-1.0, -0.5, 0.0, 0.5, 1.0), exponents, exponents)
    return np.array(list(grid))


def fit_parametric(params, tokens, loss, *, delta: float = HUBER_DELTA, starts=None, weights=None) -> ParametricFit:
    """Fit the surface to runs (N, D, L), each (runs,), minimizing sum weight * Huber_delta of the log residuals.

    `starts` are rows (a, b, e, alpha, beta); by default the standard 4500. Every start is run to convergence.
    Raises ValueError when a column is not positive and finite, there are fewer runs than parameters + 1, or no such law
    fits.
    """
    data = CentredRuns.of(params, tokens, loss)
    runs = len(data.log_loss_R)
    if runs < 6:
        raise ValueError(f"the parametric fit has 5 parameters and needs at least 6 runs, got {runs}: add runs")
    starts = standard_starts() if starts is None else np.atleast_2d(starts)
    minima = minimize(data.terms, data.log_loss_R, data.centred(starts), delta, weights)
    best = int(np.argmin(minima.objective_K))
    if not np.isfinite(minima.theta_KP[best]).all() or np.abs(minima.theta_KP[best]).max() > LARGEST_PARAMETER:
        raise ValueError("loss does not fall with N and D as a power law: check the columns and drop diverged runs")
    polished = minimize(data.terms, data.log_loss_R, minima.theta_KP[best], delta, weights, tolerance=1e-14)
    return _report(data, polished, minima, delta)


def fit_least_absolute_deviations(params, tokens, loss, *, starts=None) -> ParametricFit:
    """Fit with the sum of |log residuals| (what Besiroglu et al. 2024 publish), by continuation from the Huber fit.

    The share of agreeing starts is that of the Huber fit it continues.
    """
    huber = fit_parametric(params, tokens, loss, starts=starts)
    data = CentredRuns.of(params, tokens, loss)
    theta = data.theta(huber.surface)[None]
    for delta in LAD_DELTAS:
        minima = minimize(data.terms, data.log_loss_R, theta, delta)
        theta = minima.theta_KP
    fit = _report(data, minima, minima, LAD_DELTAS[-1])
    total = float(np.abs(fit.log_residuals).sum())
    return replace(fit, objective=total, starts=huber.starts, agreeing=huber.agreeing, converged=huber.converged)


def fit_replicates(params, tokens, log_loss, surface: Surface, *, delta: float = HUBER_DELTA, weights=None) -> Surface:
    """Refit replicates from `surface`: weights (K, runs) and/or log losses (runs,) or (K, runs). Fields are (K,)."""
    data = CentredRuns.of(params, tokens, np.exp(np.atleast_2d(log_loss)[0]))
    lanes = len(weights) if weights is not None else len(log_loss)
    starts = np.broadcast_to(data.theta(surface), (lanes, 5))
    return data.surface(minimize(data.terms, log_loss, starts, delta, weights).theta_KP)


def _report(data: CentredRuns, best: Minima, all_starts: Minima, delta: float) -> ParametricFit:
    objective = min(float(best.objective_K[0]), float(all_starts.objective_K.min()))
    theta = best.theta_KP[0]
    shares_TR = np.exp(data.terms.design_TRP @ theta - data.terms.log_sum(theta[None])[0])
    jacobian_RP = np.einsum("tr,trp->rp", shares_TR, data.terms.design_TRP)
    return ParametricFit(
        surface=data.surface(theta),
        objective=objective,
        delta=delta,
        runs=len(data.log_loss_R),
        starts=len(all_starts.objective_K),
        agreeing=float(np.mean(all_starts.objective_K <= objective * (1 + AGREEMENT) + 1e-24)),
        converged=float(np.mean(all_starts.converged_K)),
        condition=float(np.linalg.cond(jacobian_RP) ** 2),
        log_residuals=data.log_loss_R - data.terms.log_sum(theta[None])[0],
    )
