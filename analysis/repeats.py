"""Repeated data: what D tokens are worth when only U of them are unique.

Two forms, on top of a surface fitted to runs that repeat nothing:
effective data (Muennighoff et al. 2023, arXiv 2305.16264, eq. 5 and 7): with R_D = D / U - 1 repeats,
    D' = U + U R_D* (1 - exp(-R_D / R_D*)), and likewise N' from N and U_N, the optimal N for U tokens;
    by least squares of ln L, and as published by its Huber loss (delta = 1e-3), which a few runs that diverged from
    too many epochs do not move;
additive penalty (after Lovelace et al. 2026, arXiv 2605.01640): L = E + A / N^alpha + B / D^beta
    + P R_D^delta (N / U)^kappa, which can rise with further epochs, as the first form cannot.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, least_squares, minimize_scalar
from scipy.special import huber
from scipy.stats import chi2

from analysis.hyperparameters import cells_of
from analysis.surface import Surface
from analysis.uncertainty import Interval

# Half-lives are searched in this range of ln R*: below, repeats are worthless; above, as good as new.
LOG_HALF_LIFE = (-3.0, 8.0)
GRID = 23


@dataclass(frozen=True)
class EffectiveDataFit:
    """R_D* and R_N* with profile-likelihood intervals; unbounded ends are 0 and infinite."""

    surface: Surface
    data_half_life: float  # R_D*, repeats
    params_half_life: float  # R_N*, repeats of U_N
    data_interval: Interval
    params_interval: Interval
    residual_sd: float  # of ln L
    delta: float | None  # corner of the Huber loss of ln L; None for least squares

    def loss(self, params, tokens, unique):
        """Nats per token."""
        return effective_loss(self.surface, params, tokens, unique, self.data_half_life, self.params_half_life)


@dataclass(frozen=True)
class PenaltyFit:
    surface: Surface
    scale: float  # P, nats at one repeat and N = U
    repeats_exponent: float  # delta
    ratio_exponent: float  # kappa
    residual_sd: float  # of ln L

    def loss(self, params, tokens, unique):
        """Nats per token."""
        repeats = np.maximum(np.asarray(tokens) / unique - 1.0, 0.0)
        penalty = self.scale * repeats**self.repeats_exponent * (np.asarray(params) / unique) ** self.ratio_exponent
        return self.surface.loss(params, tokens) + penalty


def effective_tokens(tokens, unique, half_life: float):
    """D' of Muennighoff et al. 2023, eq. 5; D itself where nothing repeats."""
    repeats = np.maximum(np.asarray(tokens) / unique - 1.0, 0.0)
    return np.where(repeats > 0, unique * (1.0 + half_life * -np.expm1(-repeats / half_life)), tokens)


def effective_loss(surface: Surface, params, tokens, unique, data_half_life: float, params_half_life: float):
    """Loss at N' and D' (eq. 7); U_N is the size for which U tokens would be compute-optimal."""
    best = np.exp(_log_optimal_params(surface, np.log(np.minimum(unique, tokens))))
    return surface.loss(
        effective_tokens(params, np.minimum(best, params), params_half_life),
        effective_tokens(tokens, np.minimum(unique, tokens), data_half_life),
    )


def _log_optimal_params(surface: Surface, log_tokens):
    """ln N such that `tokens` is D* of the same budget: alpha A / N^alpha = beta B / D^beta."""
    balance = np.log(surface.alpha * surface.A / (surface.beta * surface.B))
    return (balance + surface.beta * log_tokens) / surface.alpha


def fit_effective_data(
    surface: Surface, params, tokens, unique, loss, level: float = 0.95, delta: float | None = None
) -> EffectiveDataFit:
    """(R_D*, R_N*) by least squares in ln L, or its Huber loss of corner `delta`, given the surface of unrepeated data.

    Raises ValueError when fewer than four runs repeat data.
    """
    params, tokens, unique, loss = _repeated_runs(params, tokens, unique, loss)
    log_loss = np.log(loss)

    def residuals(log_data: float, log_params: float) -> np.ndarray:
        predicted = effective_loss(surface, params, tokens, unique, np.exp(log_data), np.exp(log_params))
        return np.log(predicted) - log_loss

    def misfit(log_data: float, log_params: float) -> float:
        return _misfit(residuals(log_data, log_params), delta)

    def over_params(log_data: float) -> tuple[float, float]:
        return _minimum(lambda log_params: misfit(log_data, log_params))

    def over_data(log_params: float) -> tuple[float, float]:
        return _minimum(lambda log_data: misfit(log_data, log_params))

    log_data, least = _minimum(lambda x: over_params(x)[1])
    log_params = over_params(log_data)[0]
    left, (data_unit, params_unit) = (
        residuals(log_data, log_params),
        _likelihood_units(residuals, (log_data, log_params), cells_of(params, unique), delta),
    )
    return EffectiveDataFit(
        surface=surface,
        data_half_life=float(np.exp(log_data)),
        params_half_life=float(np.exp(log_params)),
        data_interval=_profile_interval(lambda x: over_params(x)[1], log_data, least, data_unit, level),
        params_interval=_profile_interval(lambda x: over_data(x)[1], log_params, least, params_unit, level),
        residual_sd=float(np.sqrt(np.sum(left**2) / (len(loss) - 2))),
        delta=delta,
    )


def _misfit(residual, delta: float | None) -> float:
    """Sum of squares, or twice that of the Huber loss, which is the same where residuals are small."""
    square = np.sum(residual**2) if delta is None else 2.0 * np.sum(huber(delta, residual))
    return float(square)


def _likelihood_units(residuals: Callable, at: tuple[float, float], cells, delta: float | None) -> np.ndarray:
    """What of the misfit is one unit of a squared standard normal, for each parameter, (2,).

    Residuals grow with the epochs and are alike in runs of one size on the same data, `cells` (runs,), as the surface
    is off by the same there. So a drop of the profile is scaled by the sandwich variance of the parameter over that
    which the misfit's curvature claims (Chandler & Bate 2007, section 3), and by no less than for even, independent
    noise. The curvature of a corner sharper than the noise is that of one as wide as the noise, its height in share.
    """
    steps = 1e-3 * np.eye(2)
    gradient_RP = np.stack([(residuals(*(at + h)) - residuals(*(at - h))) / 2e-3 for h in steps], axis=1)
    told = np.abs(gradient_RP).max(axis=1) > 1e-9  # runs that repeat nothing say nothing of half-lives
    residual, gradient_RP, cells = residuals(*at)[told], gradient_RP[told], cells[told]
    pull, bend = residual, np.ones(len(residual))
    if delta is not None:
        width = max(delta, float(np.median(np.abs(residual))))
        pull, bend = np.clip(residual, -delta, delta), (np.abs(residual) <= width) * delta / width
    groups = [cells == cell for cell in np.unique(cells)]
    scores_CP = np.stack([pull[mine] @ gradient_RP[mine] for mine in groups])
    inverse = np.linalg.pinv((gradient_RP.T * bend) @ gradient_RP, rcond=1e-12)
    sandwich = inverse @ (scores_CP.T @ scores_CP) @ inverse * len(groups) / max(len(groups) - 1, 1)
    even = max(float(np.sum(pull**2)) / max(len(residual) - 2, 1) / bend.mean(), 1e-30)
    claimed = np.diag(inverse)
    return np.maximum(np.divide(np.diag(sandwich), claimed, out=np.zeros(2), where=claimed > 0), even)


def fit_penalty(surface: Surface, params, tokens, unique, loss) -> PenaltyFit:
    """Least squares in ln L over (ln P, delta, kappa), given the surface of unrepeated data.

    Raises ValueError when fewer than four runs repeat data.
    """
    params, tokens, unique, loss = _repeated_runs(params, tokens, unique, loss)

    def unpack(theta) -> PenaltyFit:
        return PenaltyFit(surface, float(np.exp(theta[0])), float(theta[1]), float(theta[2]), 0.0)

    def residuals(theta):
        return np.log(unpack(theta).loss(params, tokens, unique) / loss)

    starts = [(log_scale, delta, 0.5) for log_scale in (-4.0, 0.0, 3.0) for delta in (0.5, 1.0, 2.0)]
    bounds = ([-40.0, 0.0, -3.0], [20.0, 6.0, 3.0])
    fits = [least_squares(residuals, start, bounds=bounds, x_scale="jac", max_nfev=2000) for start in starts]
    best = min(fits, key=lambda fit: fit.cost)
    found = unpack(best.x)
    residual_sd = float(np.sqrt(2 * best.cost / max(len(loss) - 3, 1)))
    return PenaltyFit(surface, found.scale, found.repeats_exponent, found.ratio_exponent, residual_sd)


def _repeated_runs(params, tokens, unique, loss):
    columns = [np.asarray(x, dtype=np.float64) for x in (params, tokens, unique, loss)]
    repeated = columns[1] > 1.001 * columns[2]
    if repeated.sum() < 4:
        raise ValueError(f"{repeated.sum()} runs repeat data (tokens > unique_tokens) and the fit needs 4: add some")
    return columns


def _minimum(function: Callable[[float], float]) -> tuple[float, float]:
    """Argument and value of the least of a one-dimensional function over ln R*."""
    grid = np.linspace(*LOG_HALF_LIFE, GRID)
    best = int(np.argmin([function(x) for x in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(function, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return float(found.x), float(found.fun)


def _profile_interval(profile, centre: float, least: float, unit: float, level: float) -> Interval:
    """The hull of where the profile misfit is within the chi-square quantile of its least value.

    A profile may have several valleys: the ends are those of the outermost that counts. Unbounded ends are 0 and inf.
    """

    def excess(x: float) -> float:
        return profile(x) - least - unit * chi2.ppf(level, 1)

    grid = np.unique(np.append(np.linspace(*LOG_HALF_LIFE, GRID), centre))
    inside = [x for x in grid if x == centre or excess(x) <= 0]
    below, above = grid[grid < inside[0]], grid[grid > inside[-1]]
    low = float(np.exp(brentq(excess, below[-1], inside[0], xtol=1e-3))) if len(below) else 0.0
    high = float(np.exp(brentq(excess, inside[-1], above[0], xtol=1e-3))) if len(above) else np.inf
    return Interval(low, high, level, "profile likelihood")
