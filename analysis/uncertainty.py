"""Bootstraps of the parametric fit and intervals from replicates.

Pair bootstraps resample runs; cluster bootstraps resample trunk runs with all their branches, which share noise; noise
bootstraps keep the design and redraw residuals, which is right for a planned grid and a correct surface. All refits
start from the optimum and run to convergence: an unfinished bootstrap is too narrow.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from analysis.parametric import ParametricFit, fit_replicates
from analysis.surface import Surface

PARAMETRIC_PARAMETERS = 5


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    level: float  # nominal coverage, such as 0.95
    method: str

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def percentile_interval(replicates, level: float = 0.95) -> Interval:
    """Efron's percentile interval of one statistic's replicates (K,); NaN replicates are left out."""
    low, high = np.nanquantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, "percentile")


def reflected_interval(replicates, point: float, level: float = 0.95) -> Interval:
    """The replicates' quantiles reflected about the point (the basic bootstrap, Davison & Hinkley 1997, eq. 5.6).

    For estimators that noise biases, such as a lower envelope: the percentile interval would double the bias.
    """
    low, high = np.nanquantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(2 * point - high), float(2 * point - low), level, "reflected")


def bca_interval(replicates, point: float, jackknife, level: float = 0.95) -> Interval:
    """Bias-corrected accelerated interval (Efron 1987, eq. 2.3 and 6.6), with the leave-one-out values (runs,).

    NaN ends when no replicate is finite.
    """
    replicates = np.asarray(replicates)[np.isfinite(replicates)]
    if not len(replicates):
        return Interval(np.nan, np.nan, level, "BCa")
    below = np.clip(np.mean(replicates < point), 0.5 / len(replicates), 1 - 0.5 / len(replicates))
    bias = norm.ppf(below)
    jackknife = np.asarray(jackknife)[np.isfinite(jackknife)]
    influence = np.mean(jackknife) - jackknife
    acceleration = np.sum(influence**3) / (6.0 * np.sum(influence**2) ** 1.5 + 1e-300)
    shifted = bias + norm.ppf([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(replicates, norm.cdf(bias + shifted / (1.0 - acceleration * shifted)))
    return Interval(float(low), float(high), level, "BCa")


def resampling_counts(runs: int, replicates: int, seed: int, clusters=None) -> np.ndarray:
    """How often each run is drawn in each replicate, (replicates, runs).

    With `clusters`, one label a run, whole clusters are drawn. numpy's legacy generator, so that seed 42 draws what
    Besiroglu et al. 2024 drew.
    """
    _, which = np.unique(np.arange(runs) if clusters is None else np.asarray(clusters), return_inverse=True)
    units = which.max() + 1
    drawn = np.random.RandomState(seed).choice(units, (replicates, units), replace=True)
    counts = np.stack([np.bincount(row, minlength=units) for row in drawn])
    return counts[:, which].astype(np.float64)


def resample_pairs(
    params, tokens, loss, fit: ParametricFit, *, replicates: int = 4000, seed: int = 42, clusters=None
) -> Surface:
    """Surfaces refitted to resampled runs (or clusters of runs); fields are (replicates,)."""
    counts = resampling_counts(len(np.atleast_1d(loss)), replicates, seed, clusters)
    return fit_replicates(params, tokens, np.log(loss), fit.surface, delta=fit.delta, weights=counts)


def leave_one_out(params, tokens, loss, fit: ParametricFit) -> Surface:
    """Jackknife surfaces; fields are (runs,)."""
    weights = 1.0 - np.eye(fit.runs)
    return fit_replicates(params, tokens, np.log(loss), fit.surface, delta=fit.delta, weights=weights)


def prediction_interval(
    replicates: Surface, fit: ParametricFit, params: float, tokens: float, *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Where the loss of one new run at (N, D) will fall, nats: spread of the refits plus the noise of a run."""
    noise = np.random.default_rng(seed).choice(fit.log_residuals, len(np.atleast_1d(replicates.E)))
    losses = replicates.loss(params, tokens) * np.exp(noise * np.sqrt(fit.runs / (fit.runs - PARAMETRIC_PARAMETERS)))
    interval = percentile_interval(losses, level)
    return Interval(interval.low, interval.high, level, "prediction")
