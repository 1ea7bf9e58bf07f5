"""What each method says of the target: exponents, N*, D* and the loss there, with intervals."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from analysis import envelope, isoflop
from analysis.hyperparameters import NEAR_OPTIMAL, HyperparameterLaw, fit_hyperparameter_law
from analysis.parametric import ParametricFit, fit_replicates
from analysis.surface import Surface
from analysis.uncertainty import (
    Interval,
    bca_interval,
    leave_one_out,
    percentile_interval,
    prediction_interval,
    reflected_interval,
    resampling_counts,
)
from analysis.variable_projection import ProjectionFit

# Sharp enough that replicates are least-absolute-deviation fits to three digits, smooth enough for Newton's method.
LAD_REPLICATE_DELTA = 1e-6
SETTING_LAWS = {"learning_rate": "law of the learning rate", "batch_tokens": "law of the batch size"}
# What laws are of: first that which estimates use, as in Step Law (arXiv 2503.04715), then those shown beside.
BOTH, TOKENS_ALONE = ("params", "tokens"), ("tokens",)
REGRESSORS = {"learning_rate": (BOTH, TOKENS_ALONE), "batch_tokens": (TOKENS_ALONE, BOTH)}


@dataclass(frozen=True)
class Options:
    """What the user asks: `target` in FLOPs; isoFLOP `budgets` in FLOPs, or none to find them in the data.

    With `interior_only` false a parabola's vertex beyond the sizes tried takes part in approach 2, as in some published
    fits. Settings within `near_optimal` (a share) of a cell's lowest loss make the laws of the learning rate and batch.
    """

    target: float
    level: float = 0.95
    replicates: int = 1000
    seed: int = 42
    budgets: tuple[float, ...] | None = None
    interior_only: bool = True
    near_optimal: float = NEAR_OPTIMAL


@dataclass(frozen=True)
class Quantity:
    """A number with its interval; the interval is None where the method has none."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Estimate:
    """What one method says: exponents of N*(C) and D*(C); N*, D*, the loss and the settings at the target.

    The learning rate and the batch (tokens) are those of the laws at this method's N* and D*; None without such laws.
    """

    method: str
    params_exponent: Quantity
    tokens_exponent: Quantity
    params: Quantity
    tokens: Quantity
    loss: Quantity | None = None
    learning_rate: Quantity | None = None
    batch_tokens: Quantity | None = None


def fit_settings(runs, near_optimal: float, absent: dict[str, str]) -> dict[str, list[HyperparameterLaw]]:
    """Laws of the settings in SETTING_LAWS that the runs tried: pooled and by cells, each of N and D and of D alone.

    The first of a setting is the one to use; why others are missing goes to `absent`.
    """
    laws: dict[str, list[HyperparameterLaw]] = {}
    for name, law in SETTING_LAWS.items():
        tried = runs.table.dropna(subset=[name]) if name in runs.table else runs.table.iloc[:0]
        if not len(tried) or tried[name].nunique() < 3:
            absent[law] = f"fewer than three values of {name} were tried"
            continue
        columns = [tried[c] for c in ("params", "tokens", name, "loss")]
        for regressors, pooled in product(REGRESSORS[name], (True, False)):
            try:
                fit = fit_hyperparameter_law(*columns, regressors=regressors, pooled=pooled, tolerance=near_optimal)
            except ValueError as error:
                absent.setdefault(law, str(error))
                continue
            if (fit.regressors, pooled) not in [(other.regressors, other.pooled) for other in laws.get(name, [])]:
                laws.setdefault(name, []).append(fit)
        if name in laws:
            absent.pop(law, None)
    return laws


def with_settings(estimate: Estimate, laws: dict[str, HyperparameterLaw], level: float) -> Estimate:
    """The estimate with each law's value at its N* and D*."""
    at = estimate.params.value, estimate.tokens.value
    found = {name: Quantity(float(law(*at)), law.interval(*at, level)) for name, law in laws.items()}
    return replace(estimate, learning_rate=found.get("learning_rate"), batch_tokens=found.get("batch_tokens"))


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


def bootstrap_estimate(runs, options, fit: ParametricFit, replicates: Surface, clusters) -> Estimate:
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


def absolute_estimate(runs, options, fit: ParametricFit, clusters) -> Estimate:
    params, tokens, loss = runs.points
    counts = resampling_counts(len(loss), options.replicates, options.seed, clusters)
    replicates = fit_replicates(params, tokens, np.log(loss), fit.surface, delta=LAD_REPLICATE_DELTA, weights=counts)
    quantities = {
        name: _quantity(name, statistic(fit.surface), percentile_interval(statistic(replicates), options.level))
        for name, statistic in _statistics(options).items()
    }
    return Estimate("approach 3 (LAD)", **quantities, loss=Quantity(float(fit.surface.frontier_loss(options.target))))


def projection_estimate(options, fit: ProjectionFit) -> Estimate:
    quantities = {
        name: _quantity(name, statistic(fit.surface), fit.interval(statistic, options.level))
        for name, statistic in _statistics(options).items()
    }
    loss = Quantity(
        float(fit.surface.frontier_loss(options.target)),
        fit.interval(lambda s: s.frontier_loss(options.target), options.level),
    )
    return Estimate("variable projection", **quantities, loss=loss)


def seed_means(runs, budgets):
    """(params, tokens, loss, budgets) with runs that differ in their seed alone averaged: the lowest would be luck."""
    table = runs.table[["params", "tokens", "loss"]].assign(budget=budgets)
    if "seed" in runs.table:
        table = table.groupby(["params", "tokens", "budget"], as_index=False)["loss"].mean()
    return tuple(table[name].to_numpy() for name in ("params", "tokens", "loss", "budget"))


def fit_isoflops(runs, options, budgets, estimates, absent):
    fits, all_replicates = {}, {}
    params, tokens, loss, budgets = seed_means(runs, budgets)
    for method in ("parabola", "akima"):
        name = f"approach 2 ({method})"
        try:
            fit = isoflop.fit_isoflop(params, tokens, loss, budgets, method=method, interior_only=options.interior_only)
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


def fit_envelope(runs, options, noise_sd, estimates, absent):
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
    log_tokens = float(np.log(fit.tokens_law(options.target)))
    estimates.append(
        Estimate(
            name,
            params_exponent=Quantity(float(fit.params_law.exponent), exponent),
            tokens_exponent=Quantity(float(fit.tokens_law.exponent), _mirrored(exponent, 1.0)),
            params=_quantity("params", log_size, size),
            tokens=_quantity("tokens", log_tokens, _mirrored(size, log_size + log_tokens)),
        )
    )
    return fit, copies


def _mirrored(interval: Interval, total: float) -> Interval:
    """Of `total` - x, given that of x: a stair's D is its C / 6N, so both laws have the same noise."""
    return Interval(total - interval.high, total - interval.low, interval.level, interval.method)
