"""Figures of the runs themselves: training curves, isoFLOP slices, and slices with the fitted surface."""

from itertools import cycle

import numpy as np
import pandas as pd

from analysis.figures import style
from analysis.figures.style import Drawing, NotApplicableError
from analysis.isoflop import MIN_POINTS, lowest_per_size
from analysis.study import Study

MOST_CURVES = 60
MOST_NAMED = 12  # budgets by their names at the ends of their curves; of more the colour bar alone tells


def training_curves(study: Study) -> Drawing:
    curves = study.runs.curves.dropna(subset=["flops"])
    if curves.empty:
        raise NotApplicableError("the source has no loss curves")
    if curves["run"].is_unique:
        raise NotApplicableError("every run was evaluated once, at its end: set train.evaluate_every")
    sizes = study.runs.table.set_index("run")["params"]
    names = sizes.loc[curves["run"].unique()].sort_values().index[:: -(-curves["run"].nunique() // MOST_CURVES)]
    colours, mappable = style.colours_of(sizes[names])
    figure, axes = style.new_figure()
    for name, colour in zip(names, colours, strict=True):
        mine = curves[curves["run"] == name]
        axes.plot(mine["flops"], mine["loss"], color=colour, linewidth=0.9)
        axes.plot(mine["flops"].iloc[-1:], mine["loss"].iloc[-1:], ".", color=colour, markersize=4)
    if study.envelope is not None:
        axes.plot(study.envelope.flops, study.envelope.loss, color="black", linewidth=1.6, label="lower envelope")
        axes.legend()
    figure.colorbar(mappable, ax=axes, label=style.PARAMS)
    style.log_axes(axes)
    axes.set(xlabel=style.flops_label(study.runs.flops_convention), ylabel=style.loss_label(study.runs.loss_unit))
    data = curves[curves["run"].isin(names)].assign(params=lambda c: c["run"].map(sizes))
    return Drawing(figure, data, "Training curves; black: the lower envelope that approach 1 fits.")


def isoflop(study: Study) -> Drawing:
    if "parabola" not in study.isoflops:
        raise NotApplicableError(study.absent["approach 2 (parabola)"])
    fit = study.isoflops["parabola"]
    figure, panels = style.new_figure(columns=2)
    rows = []
    sides = (
        (panels[0], "params", fit.params_vertices, study.isoflop_replicates["parabola"].params_optima),
        (panels[1], "tokens", fit.tokens_vertices, study.isoflop_replicates["parabola"].tokens_optima),
    )
    for axes, column, vertices, optima in sides:
        colours, mappable = style.colours_of([v.budget for v in vertices])
        used = [v.budget for v in vertices if v.used]
        for vertex, colour, marker in zip(vertices, colours, cycle(style.MARKERS), strict=False):
            mine = study.budgets == vertex.budget
            sizes, loss = study.runs.column(column)[mine], study.runs.column("loss")[mine]
            axes.plot(sizes, loss, marker, color=colour, markersize=4)
            if len(vertices) <= MOST_NAMED:
                style.name_curve(axes, sizes.max(), loss[sizes.argmax()], f"{vertex.budget:.2g}")
            rows.append(pd.DataFrame({"axis": column, "budget": vertex.budget, "size": sizes, "loss": loss}))
            if vertex.points >= MIN_POINTS:
                log_sizes, lowest = lowest_per_size(sizes, loss)
                curve = np.polynomial.Polynomial.fit(log_sizes, lowest, 2)
                x = np.linspace(log_sizes[0], log_sizes[-1], 60)
                axes.plot(np.exp(x), curve(x), "--", color=colour, linewidth=0.9)
            if vertex.used:
                ends = np.nanquantile(optima[:, used.index(vertex.budget)], [0.025, 0.975])
                axes.plot(ends, [vertex.loss] * 2, color="black", linewidth=1.0)
                axes.plot(vertex.optimum, vertex.loss, "*", color=colour, markeredgecolor="black", markersize=10)
        axes.margins(x=0.12)  # room for the names
        style.log_axes(axes)
    _clip_losses(panels, study.runs.column("loss"))
    panels[0].set(xlabel=style.PARAMS, ylabel=style.loss_label(study.runs.loss_unit))
    panels[1].set(xlabel=style.TOKENS)
    figure.colorbar(mappable, ax=panels, label=style.FLOPS)
    return Drawing(
        figure,
        pd.concat(rows, ignore_index=True),
        "IsoFLOP slices with their parabolas; stars: optima, bars: 95% intervals under noise.",
    )


def _clip_losses(panels, loss, least: float = 0.0) -> None:
    """A diverged run must not flatten every other: the axis ends a little above the 97th percentile, or `least`."""
    low, high = np.min(loss), max(np.quantile(loss, 0.97), least)
    for axes in panels:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.12 * (high - low))


def isoloss_slices(study: Study) -> Drawing:
    budgets, counts = np.unique(study.budgets[np.isfinite(study.budgets)], return_counts=True)
    budgets = budgets[counts >= 3]
    if not len(budgets):
        raise NotApplicableError("no budget has three runs")
    colours, mappable = style.colours_of(budgets)
    figure, axes = style.new_figure()
    params, _, loss = study.runs.points
    rows, named = [], [0.0]
    for budget, colour, marker in zip(budgets, colours, cycle(style.MARKERS), strict=False):
        mine = study.budgets == budget
        axes.plot(params[mine], loss[mine], marker, color=colour, markersize=4)
        x = np.geomspace(params[mine].min() / 1.3, params[mine].max() * 1.3, 80)
        fitted = study.huber.surface.loss(x, budget / (6.0 * x))
        axes.plot(x, fitted, color=colour, linewidth=1.0)
        if len(budgets) <= MOST_NAMED:
            style.name_curve(axes, x[-1], fitted[-1], f"{budget:.2g}")
            named.append(fitted[-1])
        rows.append(pd.DataFrame({"budget": budget, "kind": "run", "params": params[mine], "loss": loss[mine]}))
        rows.append(pd.DataFrame({"budget": budget, "kind": "fit", "params": x, "loss": fitted}))
    _clip_losses([axes], loss, least=max(named))
    figure.colorbar(mappable, ax=axes, label=style.FLOPS)
    axes.margins(x=0.1)
    style.log_axes(axes)
    axes.set(xlabel=style.PARAMS, ylabel=style.loss_label(study.runs.loss_unit))
    return Drawing(
        figure, pd.concat(rows, ignore_index=True), "Runs of each budget and the fitted surface (approach 3)."
    )
