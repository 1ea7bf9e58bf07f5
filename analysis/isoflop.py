"""Approach 2: at each compute budget find the model size of least loss, then fit N* and D* as power laws of C.

Hoffmann et al. 2022 (arXiv 2203.15556, section 3.2) fit a parabola to loss against ln N; Porian et al. 2024
(arXiv 2406.19146) interpolate ln L with Akima splines, which follow asymmetric curves better but have no error model
of their own. A budget whose optimum cannot be trusted is kept in the result with the reason, and left out of the law.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from analysis.parametric import checked_runs
from analysis.power_law import PowerLaw, fit_power_law

METHODS = ("parabola", "log parabola", "akima")
MIN_POINTS = 5
BUDGET_TOLERANCE = 0.10
AKIMA_GRID = 2000


@dataclass(frozen=True)
class Vertex:
    """The optimum of one budget, in model size or in tokens."""

    budget: float  # FLOPs
    optimum: float  # N* or D*; NaN when there is none
    loss: float  # nats per token at the optimum
    points: int
    curvature: float  # d2 L / d(ln x)2 of the parabola, nats
    r2: float  # of the parabola
    offset: float  # ln(optimum / geometric centre of the grid)
    flag: str  # what is wrong with it; empty when nothing is
    used: bool  # whether it takes part in the law


@dataclass(frozen=True)
class IsoFlopFit:
    """N*(C) and D*(C) by the isoFLOP method, with every budget's vertex in both variables."""

    method: str
    params_law: PowerLaw
    tokens_law: PowerLaw
    params_vertices: tuple[Vertex, ...]
    tokens_vertices: tuple[Vertex, ...]
    residual_sd: float  # nats, pooled over the parabolas with their degrees of freedom removed
    interior_only: bool = True  # whether vertices beyond the sizes tried were left out


def assign_budgets(flops, budgets=None, tolerance: float = BUDGET_TOLERANCE) -> np.ndarray:
    """The budget of each run, (runs,), NaN for runs of none.

    With `budgets`, the nearest within a relative `tolerance`. Without, the densest windows of that half-width are taken
    one after another, and a budget is named by the geometric mean of its runs.
    """
    log_flops = np.log(np.asarray(flops, dtype=np.float64))
    if budgets is None:
        return _densest_windows(log_flops, np.log1p(tolerance))
    budgets = np.asarray(budgets, dtype=np.float64)
    nearest = budgets[np.abs(log_flops[:, None] - np.log(budgets)).argmin(axis=1)]
    return np.where(np.abs(np.exp(log_flops) / nearest - 1.0) < tolerance, nearest, np.nan)


def _densest_windows(log_flops: np.ndarray, half_width: float) -> np.ndarray:
    assigned = np.full(len(log_flops), np.nan)
    while np.isnan(assigned).any():
        rest = np.flatnonzero(np.isnan(assigned))
        rest = rest[np.argsort(log_flops[rest], kind="stable")]
        ends = np.searchsorted(log_flops[rest], log_flops[rest] + 2 * half_width, side="right")
        first = int(np.argmax(ends - np.arange(len(rest))))
        members = rest[first : ends[first]]
        assigned[members] = np.exp(log_flops[members].mean())
    return assigned


def closest_to_budget(params, flops, budgets) -> np.ndarray:
    """Indices of one run per (budget, N rounded to whole parameters): the one whose FLOPs are closest to the budget."""
    order = np.argsort(np.abs(np.asarray(flops) / budgets - 1.0), kind="stable")
    order = order[np.isfinite(np.asarray(budgets)[order])]
    keys = np.stack([np.asarray(budgets)[order], np.round(np.asarray(params)[order])])
    _, first = np.unique(keys, axis=1, return_index=True)
    return np.sort(order[first])


def fit_isoflop(
    params,
    tokens,
    loss,
    budgets,
    *,
    method: str = "parabola",
    min_points: int = MIN_POINTS,
    interior_only: bool = True,
) -> IsoFlopFit:
    """Fit N*(C) and D*(C) from runs grouped by `budgets` (FLOPs, equal within a group; NaN leaves a run out).

    `method` is one of METHODS. Of several runs of one size in a budget the lowest loss counts. With `interior_only`
    false, a parabola's vertex beyond the grid still takes part in the law (as in some published fits), flagged.
    Raises ValueError for fewer than two usable budgets.
    """
    if method not in METHODS:
        raise ValueError(f"unknown isoFLOP method {method!r}: choose one of {', '.join(METHODS)}")
    params, tokens, loss = checked_runs(params, tokens, loss)
    budgets = np.asarray(budgets, dtype=np.float64)
    laws, vertices = [], []
    for sizes, name in ((params, "N*"), (tokens, "D*")):
        found = tuple(
            find_vertex(budget, sizes[budgets == budget], loss[budgets == budget], method, min_points, interior_only)
            for budget in np.unique(budgets[np.isfinite(budgets)])
        )
        used = [vertex for vertex in found if vertex.used]
        if len(used) < 2:
            flags = Counter(vertex.flag for vertex in found if vertex.flag)
            reasons = "; ".join(f"{flag}: {count} budgets" for flag, count in flags.items()) or "only one budget"
            raise ValueError(
                f"{name}(C) needs at least two budgets with an interior optimum, got {len(used)} ({reasons})"
            )
        laws.append(fit_power_law([v.budget for v in used], [v.optimum for v in used]))
        vertices.append(found)
    noise = pooled_residual_sd(params, loss, budgets)
    return IsoFlopFit(method, laws[0], laws[1], vertices[0], vertices[1], noise, interior_only)


def find_vertex(
    budget: float, sizes, loss, method: str, min_points: int = MIN_POINTS, interior_only: bool = True
) -> Vertex:
    """The optimum of one budget's curve of loss against ln size, and whether it can be trusted."""
    log_sizes, loss = lowest_per_size(sizes, loss)
    points = len(log_sizes)
    if points < 3:
        return Vertex(
            budget,
            np.nan,
            np.nan,
            points,
            np.nan,
            np.nan,
            np.nan,
            f"only {points} size{'s' * (points != 1)}",
            used=False,
        )
    log_optimum, least = (float(x[0]) for x in optima(log_sizes, loss[None], method, interior_only))
    curve = np.polynomial.Polynomial.fit(log_sizes, loss, 2).convert()
    curvature = 2.0 * float(curve.coef[2]) if len(curve.coef) > 2 else 0.0
    r2 = 1.0 - float(np.sum((loss - curve(log_sizes)) ** 2) / max(np.sum((loss - loss.mean()) ** 2), 1e-300))
    flag, used = "", points >= min_points and np.isfinite(log_optimum)
    if method != "akima" and curvature <= 0:
        flag = "concave"
    elif not log_sizes[0] < log_optimum < log_sizes[-1]:
        flag = "optimum at the edge of the grid"
    elif points < min_points:
        flag = f"only {points} sizes"
    offset = log_optimum - 0.5 * float(log_sizes[0] + log_sizes[-1])
    return Vertex(budget, float(np.exp(log_optimum)), least, points, curvature, r2, offset, flag, used)


def lowest_per_size(sizes, loss) -> tuple[np.ndarray, np.ndarray]:
    """ln of the distinct sizes in rising order, and the lowest loss at each."""
    distinct, which = np.unique(np.asarray(sizes, dtype=np.float64), return_inverse=True)
    lowest = np.full(len(distinct), np.inf)
    np.minimum.at(lowest, which, loss)
    return np.log(distinct), lowest


def optima(log_sizes, losses_KM, method: str, interior_only: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Interior optimum (ln size) and the loss there, (K,) each, of K replicates of a curve of M sizes.

    NaN where the curve is concave or (if `interior_only`, and always for Akima) its minimum lies at or beyond the ends
    of the grid.
    """
    if method == "akima":
        return _akima_optima(log_sizes, losses_KM)
    centre = log_sizes.mean()
    curves = np.log(losses_KM) if method == "log parabola" else losses_KM
    constant, slope, bend = np.polynomial.polynomial.polyfit(log_sizes - centre, curves.T, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = -slope / (2.0 * bend)
        least = constant - slope**2 / (4.0 * bend)
    inside = (vertex + centre > log_sizes[0]) & (vertex + centre < log_sizes[-1])
    valid = (bend > 0) & (inside if interior_only else True)
    least = np.where(valid, least, np.nan)
    return np.where(valid, vertex + centre, np.nan), np.exp(least) if method == "log parabola" else least


def _akima_optima(log_sizes, losses_KM):
    if len(log_sizes) < 3:
        return np.full((2, len(losses_KM)), np.nan)
    grid = np.linspace(log_sizes[0], log_sizes[-1], AKIMA_GRID)
    curves = Akima1DInterpolator(log_sizes, np.log(losses_KM), axis=1)(grid)
    lowest = curves.argmin(axis=1)
    interior = (lowest > 0) & (lowest < AKIMA_GRID - 1)
    least = np.exp(curves[np.arange(len(curves)), lowest])
    return np.where(interior, grid[lowest], np.nan), np.where(interior, least, np.nan)


def pooled_residual_sd(sizes, loss, budgets) -> float:
    """Noise of the loss in nats: root mean square about the budgets' parabolas, with 3 degrees of freedom each.

    Curves are not parabolas, so this is an upper bound. NaN when no budget has more than three sizes.
    """
    squares, freedom = 0.0, 0
    for budget in np.unique(budgets[np.isfinite(budgets)]):
        log_sizes, lowest = lowest_per_size(sizes[budgets == budget], loss[budgets == budget])
        if len(log_sizes) > 3:
            curve = np.polynomial.Polynomial.fit(log_sizes, lowest, 2)
            squares += float(np.sum((lowest - curve(log_sizes)) ** 2))
            freedom += len(log_sizes) - 3
    return float(np.sqrt(squares / freedom)) if freedom else np.nan


@dataclass(frozen=True)
class IsoFlopReplicates:
    """Laws refitted to noisy copies of the losses; fields of the laws are (replicates,)."""

    params_law: PowerLaw
    tokens_law: PowerLaw
    params_optima: np.ndarray  # (replicates, budgets used), NaN where a replicate has no interior optimum
    tokens_optima: np.ndarray
    budgets: np.ndarray  # (budgets used,)


def noise_replicates(
    params, tokens, loss, budgets, fit: IsoFlopFit, *, noise_sd: float | None = None, replicates: int, seed: int
) -> IsoFlopReplicates:
    """Refit with N(0, noise_sd) nats added to every loss; default: the pooled residual.

    The noise is added to each budget's fitted parabola and the optima are shifted back to those of the data. Added to
    the data themselves (Porian et al. 2024, appendix), an interpolation would see noise twice, with minima sharper than
    the curve's. Raises ValueError when the noise cannot be estimated because no budget has more than three sizes.
    """
    noise_sd = fit.residual_sd if noise_sd is None else noise_sd
    if not np.isfinite(noise_sd):
        raise ValueError("noise cannot be estimated from budgets of three sizes or fewer: pass noise_sd in nats")
    params, tokens, loss = checked_runs(params, tokens, loss)
    budgets, rng = np.asarray(budgets, dtype=np.float64), np.random.default_rng(seed)
    noise_KR = rng.normal(0.0, noise_sd, (replicates, len(loss)))
    laws, all_optima = [], []
    used = [v.budget for v in fit.params_vertices if v.used]
    for sizes, vertices in ((params, fit.params_vertices), (tokens, fit.tokens_vertices)):
        found = []
        trusted = [vertex for vertex in vertices if vertex.used]
        for vertex in trusted:
            here, log_optimum = budgets == vertex.budget, np.log(vertex.optimum)
            found.append(_replicate_optima(sizes[here], loss[here], noise_KR[:, here], log_optimum, fit))
        log_optima = np.stack(found, axis=1)
        laws.append(fit_power_law([vertex.budget for vertex in trusted], np.exp(log_optima)))
        all_optima.append(np.exp(log_optima))
    return IsoFlopReplicates(laws[0], laws[1], all_optima[0], all_optima[1], np.array(used))


def _replicate_optima(sizes, loss, noise_KM, log_optimum: float, fit: IsoFlopFit) -> np.ndarray:
    """ln of the optima of noisy copies (K,), about `log_optimum`; NaN where a copy has none."""
    smooth = np.polynomial.Polynomial.fit(np.log(sizes), loss, 2)(np.log(sizes))
    of_smooth = _optima_of_runs(sizes, smooth[None], fit)[0]
    if np.isnan(of_smooth):
        smooth, of_smooth = loss, log_optimum
    # A diverged run can make the noise estimate larger than a loss, and no loss is negative.
    copies = _optima_of_runs(sizes, np.maximum(smooth + noise_KM, 0.1 * loss), fit)
    return log_optimum + copies - of_smooth


def _optima_of_runs(sizes, losses_KM, fit: IsoFlopFit) -> np.ndarray:
    """ln of the optimum (K,) of each curve, whose sizes may repeat."""
    distinct, which = np.unique(sizes, return_inverse=True)
    lowest_KM = np.full((len(losses_KM), len(distinct)), np.inf)
    np.minimum.at(lowest_KM.T, which, losses_KM.T)
    return optima(np.log(distinct), lowest_KM, fit.method, fit.interior_only)[0]


def noise_weighted_law(budgets, log_optima_KB, grid_gaps_B) -> tuple[PowerLaw, PowerLaw, np.ndarray]:
    """Porian et al. 2024's law: per-budget median of ln N* over noisy copies, weights 1 / std^2.

    The std is floored at 0.33 of the mean of `grid_gaps_B` (mean ln spacing of each budget's sizes); budgets with an
    interior optimum in less than half of the copies are dropped. Returns the law, the law of each copy under the same
    weights, and which budgets were kept.
    """
    kept = np.isfinite(log_optima_KB).mean(axis=0) >= 0.5
    log_optima, budgets = log_optima_KB[:, kept], np.asarray(budgets)[kept]
    spread = np.nanstd(log_optima, axis=0)
    weights = 1.0 / np.maximum(spread, 0.33 * np.asarray(grid_gaps_B)[kept]) ** 2
    law = fit_power_law(budgets, np.exp(np.nanmedian(log_optima, axis=0)), weights)
    return law, fit_power_law(budgets, np.exp(log_optima), weights), kept
