"""Everything that is fitted to one table of runs, with intervals, in one value that figures and reports read."""

from dataclasses import dataclass, field

import numpy as np
from scipy.stats import norm

from analysis import envelope, isoflop
from analysis.estimates import (
    Estimate,
    Options,
    absolute_estimate,
    bootstrap_estimate,
    fit_envelope,
    fit_isoflops,
    fit_settings,
    projection_estimate,
    with_settings,
)
from analysis.extrapolation import START_STRIDE, HoldOut, hold_outs
from analysis.hyperparameters import HyperparameterLaw
from analysis.kaplan import KaplanFit, fit_kaplan
from analysis.overtraining import fit_overtraining
from analysis.parametric import ParametricFit, fit_least_absolute_deviations, fit_parametric, standard_starts
from analysis.power_law import PowerLaw
from analysis.runs import Runs, naming
from analysis.surface import Surface
from analysis.uncertainty import resample_pairs
from analysis.variable_projection import ProjectionFit, fit_by_projection

SAME = 1e-6
# A run is off the fit beyond this many robust standard deviations of ln L, and by more than a rounded loss is.
FAR, LEAST_FAR = 6.0, 1e-3
FEWEST_RUNS = 6


@dataclass(frozen=True)
class Study:
    runs: Runs  # those fitted: of several settings of one (N, D), the best
    trials: Runs  # all, as loaded
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
    settings_laws: dict[str, list[HyperparameterLaw]]  # of learning_rate and batch_tokens, where the runs tried several
    estimates: list[Estimate]
    stages: dict[str, list[Estimate]]  # of each stage of correction, when the table has several
    absent: dict[str, str] = field(default_factory=dict)  # method -> why it could not be used
    warnings: list[str] = field(default_factory=list)

    @property
    def budget_flags(self) -> list[str]:
        """Which budgets approach 2 cannot trust, one line for each method, axis and reason."""
        found = []
        for method, fit in self.isoflops.items():
            for axis, vertices in (("N", fit.params_vertices), ("D", fit.tokens_vertices)):
                for flag in sorted({v.flag for v in vertices} - {""}):
                    flagged = ", ".join(f"{v.budget:.3g}" for v in vertices if v.flag == flag)
                    found.append(f"{method} in {axis}, {flag} at budget {flagged}")
        return found

    @property
    def settings(self) -> dict[str, HyperparameterLaw]:
        """Of the laws of each setting the one that estimates and the next run use."""
        return {name: laws[0] for name, laws in self.settings_laws.items()}

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


def make_study(trials: Runs, options: Options) -> Study:
    """Fit every method that the table supports. Raises ValueError when not even the parametric fit is possible."""
    with naming(trials.source):
        return _study(trials, trials.tuned(), options)


def _study(trials: Runs, runs: Runs, options: Options) -> Study:
    params, tokens, loss = runs.points
    _check_variation(runs)
    huber = fit_parametric(params, tokens, loss)
    check_law(huber.surface)
    absolute = fit_least_absolute_deviations(params, tokens, loss, starts=_published(huber.surface)[None])
    projection = fit_by_projection(params, tokens, loss)
    check_law(absolute.surface)
    check_law(projection.surface)
    clusters = _shared_trunks(runs)
    replicates = resample_pairs(
        params, tokens, loss, huber, replicates=options.replicates, seed=options.seed, clusters=clusters
    )
    absent: dict[str, str] = {}
    estimates = [
        bootstrap_estimate(runs, options, huber, replicates, clusters),
        absolute_estimate(runs, options, absolute, clusters),
        projection_estimate(options, projection),
    ]
    budgets = isoflop.assign_budgets(runs.column("flops"), options.budgets)
    isoflops, isoflop_replicates = fit_isoflops(runs, options, budgets, estimates, absent)
    envelope_fit, envelope_replicates = fit_envelope(runs, options, projection.residual_sd, estimates, absent)
    settings_laws = fit_settings(trials, options.near_optimal, absent)
    settings = {name: laws[0] for name, laws in settings_laws.items()}
    return Study(
        runs=runs,
        trials=trials,
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
        settings_laws=settings_laws,
        estimates=[with_settings(estimate, settings, options.level) for estimate in estimates],
        stages={name: _stage_estimates(stage.tuned(), options) for name, stage in trials.stages.items()},
        absent=absent,
        warnings=_warnings(runs, options, huber),
    )


def _stage_estimates(runs: Runs, options: Options) -> list[Estimate]:
    """Approaches 2 and 3 for one stage of correction: those that its runs support."""
    estimates: list[Estimate] = []
    clusters = _shared_trunks(runs)
    try:
        fit = fit_parametric(*runs.points, starts=standard_starts()[::START_STRIDE])
        check_law(fit.surface)
        copies = resample_pairs(*runs.points, fit, replicates=options.replicates, seed=options.seed, clusters=clusters)
        estimates.append(bootstrap_estimate(runs, options, fit, copies, clusters))
    except ValueError:
        pass  # a stage of too few runs, or of no law, is one that was corrected
    fit_isoflops(runs, options, isoflop.assign_budgets(runs.column("flops"), options.budgets), estimates, {})
    return estimates


def _check_variation(runs: Runs) -> None:
    if len(runs.table) < FEWEST_RUNS:
        raise ValueError(f"a scaling law needs at least {FEWEST_RUNS} runs, got {len(runs.table)}: add runs")
    for name in ("params", "tokens", "loss"):
        if np.ptp(np.log(runs.column(name))) < SAME:
            raise ValueError(f"{name} is the same in all runs: no law can be fitted; add runs that vary it")
    flops = runs.column("flops")
    if flops.max() < (1.0 + isoflop.BUDGET_TOLERANCE) * flops.min():
        raise ValueError(f"one budget only ({flops.mean():.3g} FLOPs): no law in C can be fitted; add runs at another")


FLATTEST = 1e-6
"""Exponents: below, a term changes by less than rounding lets one see, and is part of the constant."""


def check_law(surface: Surface) -> None:
    """Raises ValueError when one of the surface's two terms has vanished or rises."""
    terms = np.array([surface.A, surface.B, surface.alpha, surface.beta], dtype=np.float64)
    if not (np.isfinite(terms).all() and terms[:2].min() > 0 and terms[2:].min() > FLATTEST):
        raise ValueError(
            f"loss does not fall with both N and D as a power law (alpha {surface.alpha:.3g}, beta "
            f"{surface.beta:.3g}): check the columns and drop diverged runs"
        )


def _outliers(runs: Runs, huber: ParametricFit) -> list[str]:
    """Which runs lie far off the fit, and what it would be without them: a few can move it more than all the rest."""
    residuals = huber.log_residuals - np.median(huber.log_residuals)
    spread = np.median(np.abs(residuals)) / norm.ppf(0.75)
    far = np.abs(residuals) > max(FAR * spread, LEAST_FAR)
    if not 0 < far.sum() <= len(far) / 4:
        return []
    try:
        without = fit_parametric(*(x[~far] for x in runs.points), starts=_published(huber.surface)[None])
    except ValueError:
        return []
    return [
        f"{far.sum()} runs lie over {FAR:g} standard deviations off the fit; without them, --exclude="
        f"{','.join(runs.column('run')[far])}, N* grows as C^{without.surface.params_exponent:.3g} instead of "
        f"C^{huber.surface.params_exponent:.3g}"
    ]


def _published(surface: Surface) -> np.ndarray:
    """(a, b, e, alpha, beta)."""
    E = max(float(surface.E), np.finfo(float).tiny)  # a fit may find no irreducible loss
    return np.array([np.log(surface.A), np.log(surface.B), np.log(E), surface.alpha, surface.beta])


def _shared_trunks(runs: Runs) -> np.ndarray | None:
    """The trunk of each run when some runs branch from the same one, for the cluster bootstrap."""
    if "trunk" not in runs.table or runs.table["trunk"].nunique() == len(runs.table):
        return None
    return runs.column("trunk")


def _warnings(runs: Runs, options: Options, huber: ParametricFit) -> list[str]:
    flops = runs.column("flops")
    params, tokens, _ = runs.points
    ratios = tokens / params
    optimum = huber.surface.optimum(options.target)
    found = list(runs.notes)
    reach = options.target / flops.max()
    if reach > 100:
        found.append(f"the target is {reach:.3g} times the largest run: an extrapolation that no interval here covers")
    if not ratios.min() <= optimum[1] / optimum[0] <= ratios.max():
        found.append(f"D/N = {optimum[1] / optimum[0]:.3g} at the target lies outside the runs' {ratios.min():.3g} to "
                     f"{ratios.max():.3g}")  # fmt: skip
    if np.ptp(np.log(ratios)) < np.log(1.5):
        found.append(f"D/N is about {np.median(ratios):.3g} in all runs: N and D cannot be told apart")
    for name, values in (("N", params), ("D", tokens)):
        if len(np.unique(values)) < 3:
            found.append(f"only two values of {name}: its exponent and E cannot be told apart")
    found += _outliers(runs, huber)
    if huber.agreeing < 0.05:
        found.append(f"only {huber.agreeing:.1%} of the starts agree with the best fit: it may not be the optimum")
    if min(huber.surface.alpha, huber.surface.beta) < 0.02:
        found.append("an exponent is nearly zero: E and a power law cannot be told apart with these runs")
    if "unique_tokens" in runs.table:
        repeated = int((runs.table["tokens"] > 1.001 * runs.table["unique_tokens"]).sum())
        if repeated:
            found.append(f"{repeated} runs repeat data; only the repeats figure accounts for it: fit the others alone")
    return found
