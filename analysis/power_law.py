"""Power laws y = coefficient * x^exponent, fitted as straight lines in log-log, one or many at once."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """y = exp(log_coefficient) * x^exponent. Fields may be arrays, one entry a replicate.

    `exponent_se` and `residual_sd` (of ln y) are those of least squares; NaN with only two points.
    """

    exponent: np.ndarray | float
    log_coefficient: np.ndarray | float
    exponent_se: np.ndarray | float = np.nan
    residual_sd: np.ndarray | float = np.nan

    def __call__(self, x):
        """y at x; replicates go along the first axis of the result."""
        exponent, log_coefficient = np.asarray(self.exponent), np.asarray(self.log_coefficient)
        log_x = np.log(x)
        if exponent.ndim and np.ndim(log_x):
            exponent, log_coefficient = exponent[:, None], log_coefficient[:, None]
        return np.exp(log_coefficient + exponent * log_x)


def fit_power_law(x, y, weights=None) -> PowerLaw:
    """Weighted least squares of ln y on ln x, with x (points,) and y (points,) or one row a replicate (K, points).

    NaN entries of y are left out. Raises ValueError when x has fewer than two distinct values.
    """
    log_x = np.log(np.asarray(x, dtype=np.float64))
    log_y = np.log(np.asarray(y, dtype=np.float64))
    if len(np.unique(log_x)) < 2:
        raise ValueError("a power law needs at least two distinct budgets (or sizes): add runs at another one")
    weight = np.isfinite(log_y) * (1.0 if weights is None else np.asarray(weights, dtype=np.float64))
    log_y = np.where(np.isfinite(log_y), log_y, 0.0)
    total = weight.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x, mean_y = (weight * log_x).sum(axis=-1) / total, (weight * log_y).sum(axis=-1) / total
        centred_x = log_x - mean_x[..., None]
        spread = (weight * centred_x**2).sum(axis=-1)
        exponent = (weight * centred_x * log_y).sum(axis=-1) / spread
        residual = log_y - mean_y[..., None] - exponent[..., None] * centred_x
        points = (weight > 0).sum(axis=-1)
        # With weights, the unit-weight variance; without, the variance of ln y.
        variance = (weight * residual**2).sum(axis=-1) / np.where(points > 2, points - 2.0, np.nan)
        exponent_se = np.sqrt(variance / spread)
    fields = (exponent, mean_y - exponent * mean_x, exponent_se, np.sqrt(variance))
    return PowerLaw(*(float(field) if np.ndim(field) == 0 else field for field in fields))
