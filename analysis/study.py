"""Everything that is fitted to one table of runs, with intervals, in one value that figures and reports read."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from analysis import envelope, isoflop
from analysis.extrapolation import HoldOut, hold_outs
from analysis.kaplan import KaplanFit, fit_kaplan
from analysis.overtraining import fit_overtraining
from analysis.parametric import ParametricFit, fit_least_absolute_deviations, fit_parametric, fit_replicates
from analysis.power_law import PowerLaw
from analysis.runs import Runs
from analysis.surface import Surface
from analysis.uncertainty import (
    Interval,
    bca_interval,
    leave_one_out,
    percentile_interval,
    prediction_interval,
    reflected_interval,
    resample_pairs,
    resampling_counts,
)
from analysis.variable_projection import ProjectionFit, fit_by_projection

# Sharp enough that replicates are least-absolute-deviation fits to three digits, smooth enough for Newton's method.
LAD_REPLICATE_DELTA = 1e-6
SAME = 1e-6


@dataclass(frozen=True)
class Options:
    """What the user asks: `target` in FLOPs; isoFLOP `budgets` in FLOPs, or none to find them in the data."""

    target: float
    level: float = 0.95
    replicates: int = 1000
    seed: int = 42
    budgets: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Quantity:
    """A number with its interval; the interval is None where the method has none."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Estimate:
    """What one method says: exponents of N*(C) and D*(C), both at the target, and the loss there (nats)."""

    method: str
    params_exponent: Quantity
    tokens_exponent: Quantity
    params: Quantity
    tokens: Quantity
    loss: Quantity | None = None


@dataclass(frozen=True)
class Study:
    runs: Runs
    options: Options
    budgets: np.ndarray  # (runs,) FLOPs
    huber: ParametricFit
    absolute: ParametricFit
    projection: ProjectionFit
    replicates: Surface  # of the Huber fit, by pairs or clusters
    bootstrap: str  # which of the two
    kaplan: KaplanFit
    overtraining: Surface
    isoflops: dict[str, isoflop.IsoFlopFit]
    isoflop_replicates: dict[str, isoflop.IsoFlopReplicates]
    envelope: envelope.EnvelopeFit | None
    envelope_replicates: PowerLaw | None
    hold_outs: list[HoldOut]
    estimates: list[Estimate]
    absent: dict[str, str] = field(default_factory=dict)  # method -> why it could not be used
    warnings: list[str] = field(default_factory=list)

    @property
    def disagreement(self) -> str:
        """Which methods' intervals for N*(target) do not meet; empty when all do."""
        bounded = [(e, e.params.interval) for e in self.estimates if e.params.interval is not None]
        apart = [
            f"{one.method} says {one.params.value:.3g} and {other.method} {other.params.value:.3g}"
            for place, (one, x) in enumerate(bounded)
            for other, y in bounded[place + 1 :]
            if x.high < y.low or y.high < x.low
        ]
        return "; ".join(apart)


def make_study(runs: Runs, options: Options) -> Study:
    """Fit every method that the table supports. Raises ValueError when not even the parametric fit is possible."""
    params, tokens, loss = runs.points
    _check_variation(runs)
    huber = fit_parametric(params, tokens, loss)
    absolute = fit_least_absolute_deviations(params, tokens, loss, starts=_published(huber.surface)[None])
    projection = fit_by_projection(params, tokens, loss)
    _check_laws(runs, huber.surface, projection.surface)
    clusters = _shared_trunks(runs)
    replicates = resample_pairs(
        params, tokens, loss, huber, replicates=options.replicates, seed=options.seed, clusters=clusters
    )
    absent: dict[str, str] = {}
    estimates = [
        _bootstrap_estimate(runs, options, huber, replicates, clusters),
        _absolute_estimate(runs, options, absolute, clusters),
        _projection_estimate(options, projection),
    ]
    budgets = isoflop.assign_budgets(runs.column("flops"), options.budgets)
    isoflops, isoflop_replicates = _fit_isoflops(runs, options, budgets, estimates, absent)
    envelope_fit, envelope_replicates = _fit_envelope(runs, options, projection.residual_sd, estimates, absent)
    return Study(
        runs=runs,
        options=options,
        budgets=budgets,
        huber=huber,
        absolute=absolute,
        projection=projection,
        replicates=replicates,
        bootstrap="pairs" if clusters is None else "clusters of a trunk run",
        kaplan=fit_kaplan(params, tokens, loss),
        overtraining=fit_overtraining(params, tokens, loss),
        isoflops=isoflops,
        isoflop_replicates=isoflop_replicates,
        envelope=envelope_fit,
        envelope_replicates=envelope_replicates,
        hold_outs=hold_outs(params, tokens, loss),
        estimates=estimates,
        absent=absent,
        warnings=_warnings(runs, options, huber, isoflops),
    )


def _check_variation(runs: Runs) -> None:
    for name in ("params", "tokens", "loss"):
        if np.ptp(np.log(runs.column(name))) < SAME:
            raise ValueError(
                f"{runs.source}: {name} is the same in all runs: no law can be fitted; add runs that vary it"
            )
    flops = runs.column("flops")
    if flops.max() < (1.0 + isoflop.BUDGET_TOLERANCE) * flops.min():
        raise ValueError(
            f"{runs.source}: one budget only ({flops.mean():.3g} FLOPs): no law in C can be fitted; add runs at another"
        )


def _check_laws(runs: Runs, *surfaces: Surface) -> None:
    for surface in surfaces:
        terms = np.array([surface.A, surface.B, surface.alpha, surface.beta], dtype=np.float64)
        if not (np.isfinite(terms).all() and terms.min() > 0):
            raise ValueError(
                f"{runs.source}: loss does not fall with both N and D as a power law (alpha {surface.alpha:.3g}, beta "
                f"{surface.beta:.3g}): check the columns and drop diverged runs"
            )


def _published(surface: Surface) -> np.ndarray:
    """(a, b, e, alpha, beta)."""
    return np.array([np.log(surface.A), np.log(surface.B), np.log(surface.E), surface.alpha, surface.beta])


def _shared_trunks(runs: Runs) -> np.ndarray | None:
    """The trunk of each run when some runs branch from the same one, for the cluster bootstrap."""
    if "trunk" not in runs.table or runs.table["trunk"].nunique() == len(runs.table):
        return None
    return runs.column("trunk")


def _statistics(options: Options) -> dict[str, Callable]:
    """Name -> function of a surface. Sizes in logarithms, where their distributions are nearest to symmetric."""
    return {
        "params_exponent": lambda s: s.params_exponent,
        "tokens_exponent": lambda s: s.tokens_exponent,
        "params": lambda s: np.log(s.optimum(options.target)[0]),
        "tokens": lambda s: np.log(s.optimum(options.target)[1]),
    }


def _quantity(name: str, value: float, interval: Interval | None) -> Quantity:
    if name not in ("params", "tokens"):
        return Quantity(float(value), interval)
    if interval is None:
        return Quantity(float(np.exp(value)))
    ends = Interval(float(np.exp(interval.low)), float(np.exp(interval.high)), interval.level, interval.method)
    return Quantity(float(np.exp(value)), ends)


def _bootstrap_estimate(runs, options, fit: ParametricFit, replicates: Surface, clusters) -> Estimate:
    """BCa intervals for resampled runs; percentile for clusters, whose jackknife would leave out whole trunks."""
    quantities = {}
    params, tokens, loss = runs.points
    jackknife = leave_one_out(params, tokens, loss, fit) if clusters is None else None
    for name, statistic in _statistics(options).items():
        values, point = statistic(replicates), statistic(fit.surface)
        if jackknife is None:
            interval = percentile_interval(values, options.level)
        else:
            interval = bca_interval(values, point, statistic(jackknife), options.level)
        quantities[name] = _quantity(name, point, interval)
    optimum = fit.surface.optimum(options.target)
    predicted = prediction_interval(replicates, fit, *optimum, level=options.level, seed=options.seed)
    loss = Quantity(float(fit.surface.loss(*optimum)), predicted)
    return Estimate("approach 3 (Huber)", **quantities, loss=loss)


def _absolute_estimate(runs, options, fit: ParametricFit, clusters) -> Estimate:
    params, tokens, loss = runs.points
    counts = resampling_counts(len(loss), options.replicates, options.seed, clusters)
    replicates = fit_replicates(params, tokens, np.log(loss), fit.surface, delta=LAD_REPLICATE_DELTA, weights=counts)
    quantities = {
        name: _quantity(name, statistic(fit.surface), percentile_interval(statistic(replicates), options.level))
        for name, statistic in _statistics(options).items()
    }
    return Estimate("approach 3 (LAD)", **quantities, loss=Quantity(float(fit.surface.frontier_loss(options.target))))


def _projection_estimate(options, fit: ProjectionFit) -> Estimate:
    quantities = {
        name: _quantity(name, statistic(fit.surface), fit.interval(statistic, options.level))
        for name, statistic in _statistics(options).items()
    }
    loss = Quantity(
        float(fit.surface.frontier_loss(options.target)),
        fit.interval(lambda s: s.frontier_loss(options.target), options.level),
    )
    return Estimate("variable projection", **quantities, loss=loss)


def _fit_isoflops(runs, options, budgets, estimates, absent):
    fits, all_replicates = {}, {}
    params, tokens, loss = runs.points
    for method in ("parabola", "akima"):
        name = f"approach 2 ({method})"
        try:
            fit = isoflop.fit_isoflop(params, tokens, loss, budgets, method=method)
            replicates = isoflop.noise_replicates(
                params, tokens, loss, budgets, fit, replicates=options.replicates, seed=options.seed
            )
        except ValueError as error:
            absent[name] = str(error)
            continue
        fits[method], all_replicates[method] = fit, replicates
        laws = (("params", fit.params_law, replicates.params_law), ("tokens", fit.tokens_law, replicates.tokens_law))
        quantities = {}
        for axis, law, copies in laws:
            exponent = percentile_interval(copies.exponent, options.level)
            size = percentile_interval(np.log(copies(options.target)), options.level)
            quantities[f"{axis}_exponent"] = Quantity(float(law.exponent), exponent)
            quantities[axis] = _quantity(axis, np.log(law(options.target)), size)
        estimates.append(Estimate(name, **quantities))
    return fits, all_replicates


def _fit_envelope(runs, options, noise_sd, estimates, absent):
    name = "approach 1 (envelope)"
    curves = runs.curves.dropna()
    if curves.empty:
        absent[name] = "the source has no loss curves"
        return None, None
    names, grid, on_grid = envelope.curves_on_grid(*(curves[c].to_numpy() for c in ("run", "flops", "loss")))
    params = runs.table.set_index("run")["params"].loc[names].to_numpy()
    try:
        fit = envelope.fit_envelope(params, grid, on_grid)
    except ValueError as error:
        absent[name] = str(error)
        return None, None
    copies = envelope.resample_seeds(
        params, grid, on_grid, noise_sd=noise_sd, replicates=min(options.replicates, 300), seed=options.seed
    )
    exponent = reflected_interval(copies.exponent, float(fit.params_law.exponent), options.level)
    log_size = float(np.log(fit.params_law(options.target)))
    size = reflected_interval(np.log(copies(options.target)), log_size, options.level)
    estimates.append(
        Estimate(
            name,
            params_exponent=Quantity(float(fit.params_law.exponent), exponent),
            tokens_exponent=Quantity(float(fit.tokens_law.exponent)),
            params=_quantity("params", log_size, size),
            tokens=Quantity(float(fit.tokens_law(options.target))),
        )
    )
    return fit, copies


def _warnings(runs: Runs, options: Options, huber: ParametricFit, isoflops) -> list[str]:
    flops = runs.column("flops")
    ratios = runs.column("tokens") / runs.column("params")
    optimum = huber.surface.optimum(options.target)
    found = list(runs.notes)
    reach = options.target / flops.max()
    if reach > 100:
        found.append(f"the target is {reach:.3g} times the largest run: an extrapolation that no interval here covers")
    if not ratios.min() <= optimum[1] / optimum[0] <= ratios.max():
        found.append(f"D/N = {optimum[1] / optimum[0]:.3g} at the target lies outside the runs' {ratios.min():.3g} to "
                     f"{ratios.max():.3g}")  # fmt: skip
    if huber.agreeing < 0.05:
        found.append(f"only {huber.agreeing:.1%} of the starts agree with the best fit: it may not be the optimum")
    if min(huber.surface.alpha, huber.surface.beta) < 0.02:
        found.append("an exponent is nearly zero: E and a power law cannot be told apart with these runs")
    if "unique_tokens" in runs.table:
        repeated = int((runs.table["tokens"] > 1.001 * runs.table["unique_tokens"]).sum())
        if repeated:
            found.append(f"{repeated} runs repeat data; only the repeats figure accounts for it: fit the others alone")
    for method, fit in isoflops.items():
        for axis, vertices in (("N", fit.params_vertices), ("D", fit.tokens_vertices)):
            found += [f"{method}, budget {v.budget:.3g}, in {axis}: {v.flag}" for v in vertices if v.flag]
    return found
