"""Figures of what compute buys: N*, D*, D/N and the frontier against C, and exponents by method."""

import numpy as np
import pandas as pd

from analysis.figures import style
from analysis.figures.style import Drawing, NotApplicableError
from analysis.study import Study

CHINCHILLA_RATIO = 20.0


def _grid(study: Study) -> np.ndarray:
    flops = study.runs.column("flops")
    return np.geomspace(flops.min(), max(study.options.target, flops.max()), 80)


def _optimum_figure(study: Study, index: int, column: str, label: str) -> Drawing:
    flops = _grid(study)
    figure, axes = style.new_figure()
    colour = style.METHOD_COLOURS["approach 3 (Huber)"]
    central = study.huber.surface.optimum(flops)[index]
    copies = np.stack([study.replicates.optimum(c)[index] for c in flops], axis=1)
    style.band(axes, flops, copies, study.options.level, colour)
    rows = [pd.DataFrame({"kind": "approach 3 (Huber)", "flops": flops, "value": central})]
    axes.plot(flops, central, color=colour, label=_legend(study, "approach 3 (Huber)", column))
    for method, fit in study.isoflops.items():
        name = f"approach 2 ({method})"
        vertices = (fit.params_vertices, fit.tokens_vertices)[index]
        law = (fit.params_law, fit.tokens_law)[index]
        copies = (study.isoflop_replicates[method].params_optima, study.isoflop_replicates[method].tokens_optima)[index]
        used = [v for v in vertices if v.used]
        value = np.array([v.optimum for v in used])
        low, high = np.nanquantile(copies, [0.025, 0.975], axis=0)
        x = np.array([v.budget for v in used]) * (1.0 if method == "parabola" else 1.06)  # side by side
        errors = np.maximum([value - low, high - value], 0.0)
        shade = style.METHOD_COLOURS[name]
        axes.errorbar(x, value, errors, fmt="o" if method == "parabola" else "s", color=shade, capsize=2, linewidth=0.9)
        axes.plot(flops, law(flops), "--", color=shade, label=_legend(study, name, column))
        rows.append(pd.DataFrame({"kind": name, "flops": x, "value": value}))
    if study.envelope is not None:
        stairs = study.envelope
        value = (stairs.stair_params, stairs.stair_flops / (6.0 * stairs.stair_params))[index]
        shade = style.METHOD_COLOURS["approach 1 (envelope)"]
        axes.plot(stairs.stair_flops, value, "^", color=shade, label=_legend(study, "approach 1 (envelope)", column))
        rows.append(pd.DataFrame({"kind": "approach 1 (envelope)", "flops": stairs.stair_flops, "value": value}))
    style.mark_target(axes, study.options.target)
    style.log_axes(axes, y=True)
    axes.set(xlabel=style.flops_label(study.runs.flops_convention), ylabel=label)
    axes.legend(loc="upper left")
    caption = f"Compute-optimal {label} by method; shaded: {study.options.level:.0%} interval of approach 3."
    return Drawing(figure, pd.concat(rows, ignore_index=True), caption)


def _legend(study: Study, method: str, column: str) -> str:
    quantity = getattr(next(e for e in study.estimates if e.method == method), f"{column}_exponent")
    if quantity.interval is None:
        return f"{method}: $C^{{{quantity.value:.3f}}}$"
    return f"{method}: $C^{{{quantity.value:.3f}}}$ [{quantity.interval.low:.3f}, {quantity.interval.high:.3f}]"


def optimal_params(study: Study) -> Drawing:
    return _optimum_figure(study, 0, "params", "N* (parameters)")


def optimal_tokens(study: Study) -> Drawing:
    return _optimum_figure(study, 1, "tokens", "D* (tokens)")


def tokens_per_param(study: Study) -> Drawing:
    flops = _grid(study)
    params, tokens = study.huber.surface.optimum(flops)
    copies = np.stack([np.divide(*study.replicates.optimum(c)[::-1]) for c in flops], axis=1)
    figure, axes = style.new_figure()
    colour = style.METHOD_COLOURS["approach 3 (Huber)"]
    style.band(axes, flops, copies, study.options.level, colour)
    style.band(axes, flops, copies, 0.8, colour)
    axes.plot(flops, tokens / params, color=colour, label="approach 3 (Huber), 80% and 95% bands")
    axes.axhline(CHINCHILLA_RATIO, color="black", linestyle="--", linewidth=1.0, label="20 tokens per parameter")
    style.mark_target(axes, study.options.target)
    style.log_axes(axes, y=True)
    axes.set(xlabel=style.flops_label(study.runs.flops_convention), ylabel="D* / N* (tokens per parameter)")
    axes.legend()
    low, high = np.nanquantile(copies, [0.1, 0.9], axis=0)
    data = style.long_table(flops=flops, ratio=tokens / params, low80=low, high80=high)
    return Drawing(figure, data, "Compute-optimal tokens per parameter.")


def contours(study: Study) -> Drawing:
    params, tokens, loss = study.runs.points
    flops = study.runs.column("flops")
    x = np.geomspace(flops.min() / 1.5, max(study.options.target, flops.max()) * 1.5, 120)
    y = np.geomspace(params.min() / 3, max(params.max(), study.huber.surface.optimum(x[-1])[0]) * 2, 120)
    surface = study.huber.surface.loss(y[:, None], x / (6.0 * y[:, None]))
    figure, axes = style.new_figure()
    E = study.huber.surface.E
    lowest, highest = study.huber.surface.frontier_loss(x[-1]), np.quantile(loss, 0.95)
    levels = E + np.geomspace(1.02 * (lowest - E), highest - E, 12)
    lines = axes.contour(x, y, surface, levels=levels, cmap="viridis", linewidths=0.8)
    axes.set(xscale="log", yscale="log", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    style.label_contours(axes, lines)
    axes.plot(x, study.huber.surface.optimum(x)[0], color=style.COLOURS[0], linewidth=2, label="efficient frontier")
    axes.plot(flops, params, "o", color="black", markersize=2.5, label="runs")
    style.mark_target(axes, study.options.target)
    style.log_axes(axes, y=True)
    axes.set(xlabel=style.flops_label(study.runs.flops_convention), ylabel=style.PARAMS)
    axes.legend(loc="upper left")
    data = style.long_table(flops=flops, params=params, tokens=tokens, loss=loss)
    return Drawing(figure, data, "Contours of the fitted loss over N and C, the frontier, and the runs.")


def exponents(study: Study) -> Drawing:
    figure, axes = style.new_figure(height=0.9 + 0.45 * len(study.estimates))
    rows = []
    for place, estimate in enumerate(reversed(study.estimates)):
        quantity, colour = estimate.params_exponent, style.METHOD_COLOURS[estimate.method]
        low, high = (np.nan, np.nan) if quantity.interval is None else (quantity.interval.low, quantity.interval.high)
        axes.plot([low, high], [place, place], color=colour, linewidth=2.2)
        axes.plot(quantity.value, place, "o", color=colour)
        axes.annotate(f"{quantity.value:.3f}", (quantity.value, place), (0, 6), textcoords="offset points", ha="center")
        rows.append({"method": estimate.method, "exponent": quantity.value, "low": low, "high": high})
    axes.axvline(0.5, color="black", linestyle="--", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.2)
    axes.set_xlabel(f"exponent a of N* ~ C^a ({study.runs.params_convention} N, {study.options.level:.0%} intervals)")
    return Drawing(figure, pd.DataFrame(rows), "The exponent by method.")


def stages(study: Study) -> Drawing:
    """Porian et al. 2024, figure 1: how each correction of the sweep moves the exponent."""
    if not study.stages:
        raise NotApplicableError("no column `stage` with several stages of correction")
    figure, axes = style.new_figure(width=max(5.2, 1.2 * len(study.stages) + 2.5))
    methods = list(dict.fromkeys(e.method for estimates in study.stages.values() for e in estimates))
    for method in methods:
        axes.plot([], [], "o", color=style.METHOD_COLOURS[method], label=method)
    rows = []
    for place, (stage, estimates) in enumerate(study.stages.items()):
        for estimate in estimates:
            quantity, colour = estimate.params_exponent, style.METHOD_COLOURS[estimate.method]
            x = place + 0.18 * (methods.index(estimate.method) - (len(methods) - 1) / 2)
            ends = (quantity.interval.low, quantity.interval.high) if quantity.interval else (np.nan, np.nan)
            axes.plot([x, x], ends, color=colour, linewidth=2.2)
            axes.plot(x, quantity.value, "o", color=colour)
            row = {"stage": stage, "method": estimate.method, "exponent": quantity.value}
            rows.append({**row, "low": ends[0], "high": ends[1]})
    axes.axhline(0.5, color="black", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(study.stages)), list(study.stages))
    axes.set(xlim=(-0.6, len(study.stages) - 0.4), xlabel="stage of correction")
    axes.set_ylabel(f"exponent a of N* ~ C^a ({study.options.level:.0%} intervals)")
    axes.legend(loc="best")
    return Drawing(figure, pd.DataFrame(rows), "The exponent by stage of correction.")
