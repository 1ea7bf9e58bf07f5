"""Sweeps that grow by themselves, simulated from a known surface, beside the fixed isoFLOP grid that is as accurate."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from analysis.design import Candidates, standard_errors
from analysis.forecast import Calibration, score_forecasts
from analysis.growth import Goal, Recommendation, Stop, plan_next
from analysis.simulate import Sweep, isoflop_grid
from analysis.surface import FLOPS_PER_PARAM_TOKEN, Surface

# How many budgets a fixed grid may have, and how far its last may lie above its first.
GRID_BUDGETS = range(3, 10)
WIDEST_GRID = 1e6


@dataclass(frozen=True)
class Grown:
    """A sweep that has stopped."""

    params: np.ndarray  # (runs,)
    tokens: np.ndarray
    loss: np.ndarray
    reason: str
    recommendation: Recommendation | None
    calibration: Calibration

    @property
    def flops(self) -> float:
        return float(np.sum(FLOPS_PER_PARAM_TOKEN * self.params * self.tokens))


def simulate_growth(
    surface: Surface, noise_sd: float, *, goal: Goal, candidates: Candidates, budget: float, seed: int
) -> Grown:
    """Grow a sweep until `plan_next` stops it: every cell it asks for ends with the surface's loss and seed noise."""
    rng = np.random.default_rng(seed)
    params, tokens, loss = np.empty((3, 0))
    forecasts: dict[str, dict] = {}
    while True:
        spent = float(np.sum(FLOPS_PER_PARAM_TOKEN * params * tokens))
        planned = plan_next(params, tokens, loss, goal=goal, candidates=candidates, flops_left=budget - spent)
        if isinstance(planned, Stop):
            scored = score_forecasts(forecasts, params, tokens, loss)
            return Grown(params, tokens, loss, planned.reason, planned.recommendation, scored)
        cells = planned.cells
        forecasts |= {forecast["sha256"]: forecast for forecast in planned.forecasts}
        noise = rng.normal(0.0, noise_sd, len(cells.params))
        loss = np.append(loss, surface.loss(cells.params, cells.tokens) + noise)
        params, tokens = np.append(params, cells.params), np.append(tokens, cells.tokens)


def cheapest_grid(surface: Surface, noise_sd: float, *, target: float, log_params_se: float, smallest: float) -> Sweep:
    """The isoFLOP grid of least FLOPs, without losses, from which ln N*(`target`) has this standard error.

    Three to nine log-spaced budgets x 7 sizes within 4x of the true optimum, the best place for them; the first budget
    is the one whose smallest model has `smallest` parameters, and the last follows from the standard error (delta
    method). Raises ValueError when no such grid is that accurate.
    """
    first = brentq(lambda log_c: np.log(surface.optimum(np.exp(log_c))[0] / 4.0 / smallest), *np.log((1e9, 1e30)))
    grids = []
    for count in GRID_BUDGETS:

        def grid(log_width: float, count: int = count):
            return isoflop_grid(surface, np.exp(first + log_width * np.linspace(0.0, 1.0, count)))

        def excess(log_width: float, count: int = count, grid=grid) -> float:
            _, params, tokens = grid(log_width)
            return np.log(standard_errors(surface, params, tokens, target, noise_sd)[1] / log_params_se)

        narrow, wide = np.log(2.0), np.log(WIDEST_GRID)
        if excess(narrow) <= 0:
            grids.append(grid(narrow))
        elif excess(wide) <= 0:
            grids.append(grid(brentq(excess, narrow, wide)))
    if not grids:
        raise ValueError(f"no grid of up to {GRID_BUDGETS[-1]} budgets has a standard error of {log_params_se:.3g}")
    budget, params, tokens = min(grids, key=lambda one: one[0].sum())
    return Sweep(budget, params, tokens, np.empty((0, len(params))))
