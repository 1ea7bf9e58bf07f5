"""Approach 1: the lower envelope of the loss curves against compute (Hoffmann et al. 2022, section 3.1).

Each run's curve is interpolated on 1500 log-spaced FLOPs; where a run holds the lowest loss its (N, D) is optimal.
The winning size climbs a staircase. A line through all 1500 points is too flat by a factor 1 - 1/n^2 for n stairs, so
the laws go through the middle of each stair. Runs must be as good at every point as if they had been decayed there:
points of an undecayed trunk are too high.
"""

from dataclasses import dataclass

import numpy as np

from analysis.power_law import PowerLaw, fit_power_law
from analysis.surface import FLOPS_PER_PARAM_TOKEN

GRID = 1500
MIN_SIZES = 3


@dataclass(frozen=True)
class EnvelopeFit:
    """The envelope on the grid, and the laws through the stairs of all sizes but the smallest and largest."""

    params_law: PowerLaw
    tokens_law: PowerLaw
    flops: np.ndarray  # (points,) grid
    loss: np.ndarray  # (points,) the envelope
    winner: np.ndarray  # (points,) N of the run that holds it
    stair_flops: np.ndarray  # (stairs,) geometric middle of the stretch that a size wins
    stair_params: np.ndarray


def smooth(loss, half_width: float = 0.05) -> np.ndarray:
    """Mean of each point over a symmetric window of +-5% of its index (Porian et al. 2024), in nats."""
    totals = np.concatenate([[0.0], np.cumsum(np.asarray(loss, dtype=np.float64))])
    index = np.arange(len(totals) - 1)
    reach = np.minimum(np.floor(half_width * index).astype(int), len(index) - 1 - index)
    return (totals[index + reach + 1] - totals[index - reach]) / (2 * reach + 1)


def curves_on_grid(run, flops, loss) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Names of the runs, the grid of FLOPs (points,), every run's loss on it (runs, points), inf outside its range."""
    names = np.unique(run)
    grid = np.geomspace(np.min(flops), np.max(flops), GRID)
    curves = np.full((len(names), GRID), np.inf)
    for row, name in enumerate(names):
        mine = run == name
        order = np.argsort(flops[mine])
        x, y = np.log(flops[mine][order]), loss[mine][order]
        curves[row] = np.interp(np.log(grid), x, y, left=np.inf, right=np.inf)
    return names, grid, curves


def fit_envelope(params, flops, curves) -> EnvelopeFit:
    """Fit the laws from `curves` (runs, points) on `flops` (points,), with `params` (runs,).

    Raises ValueError when fewer than three sizes but the extremes hold the envelope somewhere.
    """
    params = np.asarray(params, dtype=np.float64)
    sizes, stair_flops = _stairs(params, flops, curves)
    if len(sizes) < MIN_SIZES:
        raise ValueError(
            f"the envelope is held by {len(sizes)} sizes between the smallest and the largest, and needs {MIN_SIZES}: "
            "add sizes or train longer"
        )
    held = np.isfinite(curves).any(axis=0)
    return EnvelopeFit(
        params_law=fit_power_law(stair_flops, sizes),
        tokens_law=fit_power_law(stair_flops, stair_flops / (FLOPS_PER_PARAM_TOKEN * sizes)),
        flops=flops[held],
        loss=curves.min(axis=0)[held],
        winner=params[curves.argmin(axis=0)][held],
        stair_flops=stair_flops,
        stair_params=sizes,
    )


def _stairs(params, flops, curves) -> tuple[np.ndarray, np.ndarray]:
    """The sizes that win somewhere, without the extremes, and the geometric middle of what each wins."""
    winner = params[curves.argmin(axis=0)]
    inside = np.isfinite(curves).any(axis=0) & (winner != params.min()) & (winner != params.max())
    sizes, which = np.unique(winner[inside], return_inverse=True)
    middles = np.bincount(which, np.log(flops[inside])) / np.bincount(which)
    return sizes, np.exp(middles)


def resample_seeds(params, flops, curves, *, noise_sd: float, replicates: int, seed: int) -> PowerLaw:
    """N*(C) refitted with every curve shifted by its own N(0, `noise_sd`) nats, the noise between seeds.

    Points of one curve share the run's luck, so resampling points would be far too narrow. A minimum over noisy
    curves is biased: use `uncertainty.reflected_interval`.
    """
    rng, params = np.random.default_rng(seed), np.asarray(params, dtype=np.float64)
    laws = []
    for _ in range(replicates):
        sizes, middles = _stairs(params, flops, curves + rng.normal(0.0, noise_sd, (len(curves), 1)))
        if len(sizes) >= MIN_SIZES:
            laws.append(fit_power_law(middles, sizes))
    return PowerLaw(np.array([law.exponent for law in laws]), np.array([law.log_coefficient for law in laws]))
