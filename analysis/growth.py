"""Which cells a sweep that grows by itself trains next, when it stops, and what it recommends.

Every decision follows from the runs so far and from nothing else, so the same command can be given at any time. The
interval of ln N*(target) must stay honest although it is looked at after every batch and the sweep stops when it looks
narrow, which favours looks that took the noise for less than it is. So no sweep stops before `FEWEST_TO_STOP` runs,
Student's t pays for the degrees of freedom, and noise is never taken for less than a floor.
`tests/analysis/test_growth_study.py` measures what is left.
"""

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np
from scipy.stats import t as student

from analysis.design import Candidates, loss_gradient, next_cells, spread_cells
from analysis.estimates import Estimate, Options, Quantity, projection_estimate
from analysis.forecast import seal
from analysis.simulate import EPOCH
from analysis.surface import Surface
from analysis.uncertainty import Interval
from analysis.variable_projection import ProjectionFit, fit_by_projection

# The runs that spread before a fit is asked where to go, and the share of the FLOPs left that a spread batch may take.
START_RUNS, START_SHARE = 8, 0.03
FEWEST_TO_STOP = 16
# No other cell may take more than this share of the FLOPs left: the next fit may know better.
LARGEST_SHARE = 0.25
# A run has diverged when its loss is this many nats above that of a run of no more N and no more D, ...
FAR = 0.25
# ... or above the interval of this level that a fit to all others predicts. Such are one run in so many at most: where
# there are more, the surface bends, and no run is to blame.
FAR_LEVEL, ONE_IN = 0.9999, 8
# Only as many that lie farthest off are tried, and only with so large a share of the residuals: each is a fit more.
SUSPECTS, SUSPECT = 3, 0.5
# A cell is taken for one that was trained when its ln N and ln D are within this: N and D get rounded.
SAME_CELL = 0.05
# Exponents outside are those of runs that cannot tell a power law from a constant or from a step.
EXPONENTS = (0.03, 1.5)


@dataclass(frozen=True)
class Goal:
    """What the sweep is for: ln N*(`target` FLOPs) to within `tolerance` either side at `level`.

    Batches of `batch` cells, about `runs` runs in all, fewest FLOPs. `noise_sd` is the least that seeds are taken to
    differ by, nats; `prior` the surface supposed until there is a fit. Raises ValueError for what cannot be.
    """

    target: float
    tolerance: float = 0.2
    level: float = 0.9
    batch: int = 4
    runs: int = 40
    noise_sd: float = 0.003
    prior: Surface = EPOCH

    def __post_init__(self) -> None:
        for name in ("target", "tolerance", "noise_sd"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")
        if not 0 < self.level < 1:
            raise ValueError(f"level is {self.level}: give a share between 0 and 1, such as 0.9")
        if self.batch < 1 or self.runs < FEWEST_TO_STOP:
            raise ValueError(
                f"batch must be at least 1 and runs at least {FEWEST_TO_STOP}, not {self.batch}, {self.runs}"
            )


@dataclass(frozen=True)
class Recommendation:
    """N*, D* and the loss of a run there, with its prediction interval, at the target; and what they rest on."""

    estimate: Estimate
    fit: ProjectionFit
    left_out: tuple[int, ...]  # places of the runs that diverged

    @property
    def interval(self) -> Interval:
        """Of N*."""
        assert self.estimate.params.interval is not None  # variable projection has one of every quantity
        return self.estimate.params.interval

    @property
    def half(self) -> float:
        """Half the interval of ln N*."""
        return 0.5 * float(np.log(self.interval.high / self.interval.low))


@dataclass(frozen=True)
class Stop:
    reason: str
    recommendation: Recommendation | None  # none when the runs do not tell the exponents apart


@dataclass(frozen=True)
class Grow:
    """Train `cells`, none while those that run may be enough; `forecasts`, one a cell, say what will come out.

    Without a fit there are no forecasts.
    """

    cells: Candidates
    forecasts: tuple[dict, ...]
    recommendation: Recommendation | None


def plan_next(
    params,
    tokens,
    loss,
    *,
    goal: Goal,
    candidates: Candidates,
    flops_left: float,
    running: tuple = ((), ()),
    now: datetime | None = None,
) -> Stop | Grow:
    """Stop, or the next batch, after runs of N `params`, D `tokens`, `loss` (runs,) in nats, NaN where one diverged.

    `running` are the N and D of cells that have not ended: their results are counted on, their losses not known.
    `flops_left` is what may still be spent besides them. `now` dates the forecasts. Raises ValueError when the columns
    differ in length or a size is not positive.
    """
    params, tokens, loss = _columns(params, tokens, loss)
    running_params, running_tokens = _columns(*running)
    kept = ~diverged(params, tokens, loss, goal.noise_sd)
    found = _recommendation(params, tokens, loss, kept, goal)
    if found and found.fit.runs >= FEWEST_TO_STOP and found.half <= goal.tolerance:
        return Stop(f"half the interval of ln N* is {found.half:.3f}, within {goal.tolerance:g}", found)
    known = Candidates(np.append(params[kept], running_params), np.append(tokens[kept], running_tokens))
    fresh = _untried(candidates, np.append(params, running_params), np.append(tokens, running_tokens))
    cells = _next_batch(found, known, len(running_params), fresh, goal, flops_left)
    if len(cells.params) or len(running_params):
        evidence = hashlib.sha256(np.stack([params, tokens, loss]).tobytes()).hexdigest()
        return Grow(cells, _forecasts(found, cells, goal, evidence, now), found)
    why = "and they pay for no new cell"
    if len(fresh.params):
        share = f"of which a cell may take {LARGEST_SHARE:.0%}"
        why = f"{share}, and the cheapest new one costs {fresh.flops.min():.3g}"
    return Stop(f"{flops_left:.3g} FLOPs are left, {why}", found)


def recommend(params, tokens, loss, *, goal: Goal) -> Recommendation:
    """N*, D* and the loss at the target from all runs (runs,), without those that diverged.

    Raises ValueError while the runs do not tell the exponents apart.
    """
    params, tokens, loss = _columns(params, tokens, loss)
    found = _recommendation(params, tokens, loss, ~diverged(params, tokens, loss, goal.noise_sd), goal)
    if found is None:
        raise ValueError(f"{len(loss)} runs do not tell the exponents apart: add runs that differ in N and in D / N")
    return found


def diverged(params, tokens, loss, noise_sd: float) -> np.ndarray:
    """Which runs (runs,) have no loss, or one far above what the others say; `noise_sd` is the least noise, nats.

    Law or none, a run is hardly worse than a smaller one that saw no more. What that leaves is fitted without one run
    at a time, while at least `START_RUNS` are left.
    """
    out = ~(np.isfinite(loss) & (loss > 0))
    smaller = (params[:, None] >= params) & (tokens[:, None] >= tokens) & ~out
    with np.errstate(invalid="ignore"):
        out |= (smaller & (loss[:, None] > loss + FAR)).any(axis=1)
    for _ in range(len(loss) // ONE_IN):
        kept = np.flatnonzero(~out)
        out[_farthest(params, tokens, loss, kept, noise_sd) if len(kept) >= START_RUNS else []] = True
    return out


def _farthest(params, tokens, loss, kept: np.ndarray, noise_sd: float) -> list[int]:
    """The run of `kept` farthest above what the others predict; none when all are within their intervals."""
    fit = fit_by_projection(params[kept], tokens[kept], loss[kept], least_noise=noise_sd)
    gradients = loss_gradient(fit.surface, params[kept], tokens[kept])
    leverage = np.einsum("rp,pq,rq->r", gradients, fit.covariance, gradients) / fit.residual_sd**2
    # As shares of the largest studentized residual that runs - 5 degrees of freedom allow (Cook & Weisberg 1982, 2.2).
    residuals = loss[kept] - fit.surface.loss(params[kept], tokens[kept])
    shares = residuals / (fit.residual_sd * np.sqrt((fit.runs - 5) * np.clip(1.0 - leverage, 1e-3, 1.0)))
    excess = {}
    for run in [int(kept[place]) for place in np.argsort(-shares)[:SUSPECTS] if shares[place] > SUSPECT]:
        others = kept[kept != run]
        rest = fit_by_projection(params[others], tokens[others], loss[others], least_noise=noise_sd)
        if determined(rest.surface):
            excess[run] = loss[run] - rest.prediction(params[run], tokens[run], FAR_LEVEL).high
    return sorted((run for run in excess if excess[run] > 0), key=lambda run: -excess[run])[:1]


def determined(surface: Surface) -> bool:
    """Whether both terms are there, with exponents that tell a power law from a constant and from a step."""
    low, high = EXPONENTS
    return bool(
        min(surface.A, surface.B) > 0
        and low < min(surface.alpha, surface.beta)
        and max(surface.alpha, surface.beta) < high
    )


def _columns(*columns) -> list[np.ndarray]:
    """N, D and perhaps losses, as float64 (runs,)."""
    arrays = [np.atleast_1d(np.asarray(column, dtype=np.float64)) for column in columns]
    if len({array.shape for array in arrays}) != 1:
        raise ValueError(f"params, tokens and loss differ in length: {[len(array) for array in arrays]}")
    for name, array in zip(("params", "tokens"), arrays, strict=False):
        if not (np.isfinite(array) & (array > 0)).all():
            raise ValueError(f"{name} must be finite and positive, not {array[~(array > 0)][:1]}: repair the table")
    return arrays


def _recommendation(params, tokens, loss, kept: np.ndarray, goal: Goal) -> Recommendation | None:
    """From the runs `kept`; None while they are too few for a fit, or do not tell the exponents apart."""
    if kept.sum() < 6:
        return None
    fit = fit_by_projection(params[kept], tokens[kept], loss[kept], least_noise=goal.noise_sd)
    if not determined(fit.surface):
        return None
    estimate = projection_estimate(Options(goal.target, goal.level), fit)
    at = estimate.params.value, estimate.tokens.value
    loss_there = Quantity(float(fit.surface.loss(*at)), fit.prediction(*at, goal.level))
    return Recommendation(replace(estimate, loss=loss_there), fit, tuple(int(run) for run in np.flatnonzero(~kept)))


def _untried(candidates: Candidates, params, tokens) -> Candidates:
    """Without those at the (N, D) of a run: the same cell again would be the same run."""
    off_params = np.abs(np.log(candidates.params[:, None] / params))
    off_tokens = np.abs(np.log(candidates.tokens[:, None] / tokens))
    return candidates.take(~((off_params < SAME_CELL) & (off_tokens < SAME_CELL)).any(axis=1))


def _next_batch(
    found: Recommendation | None, known: Candidates, running: int, fresh: Candidates, goal: Goal, flops_left: float
) -> Candidates:
    """The cells to add to those `known`, of which the last `running` have not ended."""
    total = len(known.params)
    if found is None:
        more = 0 if running else goal.batch
        return _spread(known, fresh, goal, flops_left, START_RUNS - total if total < START_RUNS else more)
    enough = goal.tolerance / student.ppf((1 + goal.level) / 2, found.fit.runs - 5)
    return next_cells(
        found.fit.surface, known.params, known.tokens, fresh.take(fresh.flops <= LARGEST_SHARE * flops_left),
        target=goal.target, noise_sd=found.fit.residual_sd, count=goal.batch - running,
        fewest=max(FEWEST_TO_STOP - total, 0 if running else 1), enough=enough,
        within=max(goal.batch, goal.runs - total), budget=flops_left,
    )  # fmt: skip


def _spread(known: Candidates, fresh: Candidates, goal: Goal, flops_left: float, count: int) -> Candidates:
    """`count` cells that tell all parameters near the prior surface, each for a small part of the FLOPs left.

    Where hardly any cell is that cheap, the cheapest few times `count` are there to choose from.
    """
    cheapest = np.sort(fresh.flops)[: 3 * count]
    cheap = max(START_SHARE * flops_left / max(count, 1), cheapest.max(initial=0.0))
    return spread_cells(
        goal.prior, known.params, known.tokens, fresh.take(fresh.flops <= cheap),
        noise_sd=goal.noise_sd, count=count, budget=flops_left,
    )  # fmt: skip


def _forecasts(
    found: Recommendation | None, cells: Candidates, goal: Goal, evidence: str, now: datetime | None
) -> tuple[dict, ...]:
    """What `analysis.forecast` reads and scores, one for each cell; none without a fit."""
    if found is None:
        return ()
    surface = found.fit.surface
    basis = {
        "level": goal.level,
        "method": found.estimate.method,
        "runs": found.fit.runs,
        "data_sha256": evidence,
        "surface": {name: float(getattr(surface, name)) for name in ("E", "A", "B", "alpha", "beta")},
    }
    made = []
    for params, tokens in zip(cells.params.tolist(), cells.tokens.tolist(), strict=True):
        interval = found.fit.prediction(params, tokens, goal.level)
        cell = {"params": params, "tokens": tokens, "loss": float(surface.loss(params, tokens))}
        made.append(seal({**cell, "low": interval.low, "high": interval.high, **basis}, now))
    return tuple(made)
