"""Repeated data: what D tokens are worth when only U of them are unique.

Two forms, on top of a surface fitted to runs that repeat nothing:
effective data (Muennighoff et al. 2023, arXiv 2305.16264, eq. 5 and 7): with R_D = D / U - 1 repeats,
    D' = U + U R_D* (1 - exp(-R_D / R_D*)), and likewise N' from N and U_N, the optimal N for U tokens;
additive penalty (after Lovelace et al. 2026, arXiv 2605.01640): L = E + A / N^alpha + B / D^beta
    + P R_D^delta (N / U)^kappa, which can rise with further epochs, as the first form cannot.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, least_squares, minimize_scalar
from scipy.stats import chi2

from analysis.surface import Surface
from analysis.uncertainty import Interval

# Half-lives are searched in this range of ln R*: below, repeats are worthless; above, as good as new.
LOG_HALF_LIFE = (-3.0, 8.0)


@dataclass(frozen=True)
class EffectiveDataFit:
    """R_D* and R_N* with profile-likelihood intervals; an end at the edge of the search means unbounded."""

    surface: Surface
    data_half_life: float  # R_D*, repeats
    params_half_life: float  # R_N*, repeats of U_N
    data_interval: Interval
    params_interval: Interval
    residual_sd: float  # of ln L

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


def fit_effective_data(surface: Surface, params, tokens, unique, loss, level: float = 0.95) -> EffectiveDataFit:
    """Least squares in ln L over (R_D*, R_N*), given the surface of unrepeated data.

    Raises ValueError when fewer than four runs repeat data.
    """
    params, tokens, unique, loss = _repeated_runs(params, tokens, unique, loss)
    log_loss = np.log(loss)

    def misfit(log_data: float, log_params: float) -> float:
        predicted = effective_loss(surface, params, tokens, unique, np.exp(log_data), np.exp(log_params))
        return float(np.sum((np.log(predicted) - log_loss) ** 2))

    def over_params(log_data: float) -> tuple[float, float]:
        return _minimum(lambda log_params: misfit(log_data, log_params))

    def over_data(log_params: float) -> tuple[float, float]:
        return _minimum(lambda log_data: misfit(log_data, log_params))

    log_data, least = _minimum(lambda x: over_params(x)[1])
    log_params = over_params(log_data)[0]
    variance = max(least / (len(loss) - 2), 1e-30)
    return EffectiveDataFit(
        surface=surface,
        data_half_life=float(np.exp(log_data)),
        params_half_life=float(np.exp(log_params)),
        data_interval=_profile_interval(lambda x: over_params(x)[1], log_data, least, variance, level),
        params_interval=_profile_interval(lambda x: over_data(x)[1], log_params, least, variance, level),
        residual_sd=float(np.sqrt(variance)),
    )


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
    grid = np.linspace(*LOG_HALF_LIFE, 23)
    best = int(np.argmin([function(x) for x in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(function, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return float(found.x), float(found.fun)


def _profile_interval(profile, centre: float, least: float, variance: float, level: float) -> Interval:
    """Where the profile misfit is within the chi-square quantile of its least value; unbounded ends are 0 and inf."""

    def excess(x: float) -> float:
        return profile(x) - least - variance * chi2.ppf(level, 1)

    floor, ceiling = LOG_HALF_LIFE
    low = 0.0 if excess(floor) <= 0 else float(np.exp(brentq(excess, floor, centre, xtol=1e-3)))
    high = np.inf if excess(ceiling) <= 0 else float(np.exp(brentq(excess, centre, ceiling, xtol=1e-3)))
    return Interval(low, high, level, "profile likelihood")
