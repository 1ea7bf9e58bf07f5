"""Figures beyond the compute optimum: over-training, downstream error, repeated data, inference."""

import numpy as np
import pandas as pd

from analysis.figures import style
from analysis.figures.style import Drawing, NotApplicableError
from analysis.inference import inference_optimum
from analysis.overtraining import fit_error_law, overtraining_penalty, resample_error_law
from analysis.parametric import HUBER_DELTA, fit_parametric, standard_starts
from analysis.repeats import EffectiveDataFit, fit_effective_data
from analysis.study import Study

ERROR_REPLICATES = 500
RATIO_LINES = (5.0, 20.0, 80.0, 320.0, 1280.0)


def reducible_loss(study: Study) -> Drawing:
    """Gadre et al. 2024, figure 1: at a fixed M = D / N the reducible loss is a straight line in C."""
    params, tokens, loss = study.runs.points
    law, ratios = study.overtraining, tokens / params
    lines = [m for m in RATIO_LINES if ratios.min() / 2 < m < ratios.max() * 2] or [float(np.median(ratios))]
    flops = study.runs.column("flops")
    x = np.geomspace(flops.min(), max(flops.max(), study.options.target), 50)
    figure, axes = style.new_figure()
    nearest = np.argmin(np.abs(np.log(ratios[:, None] / lines)), axis=1)
    above = loss > law.E
    colours, _ = style.colours_of(lines, "plasma")
    rows = []
    for index, (ratio, colour) in enumerate(zip(lines, colours, strict=True)):
        size = np.sqrt(x / (6.0 * ratio))
        fitted = law.loss(size, size * ratio) - law.E
        axes.plot(x, fitted, color=colour, label=f"M = {ratio:g}")
        mine = (nearest == index) & above
        axes.plot(flops[mine], loss[mine] - law.E, "o", color=colour, markersize=3)
        rows.append(pd.DataFrame({"ratio": ratio, "flops": x, "reducible_loss": fitted}))
    style.log_axes(axes, y=True)
    axes.set(
        xlabel=style.flops_label(study.runs.flops_convention), ylabel=f"L - E ({study.runs.loss_unit}), E = {law.E:.3f}"
    )
    axes.legend(title="tokens per parameter")
    return Drawing(figure, pd.concat(rows, ignore_index=True), "Reducible loss by token multiple (over-training law).")


def overtraining(study: Study) -> Drawing:
    params, tokens, loss = study.runs.points
    ratios = np.geomspace(1.0, 2000.0, 100)
    flops = study.runs.column("flops")
    budgets = np.geomspace(flops.min(), max(flops.max(), study.options.target), 4)
    figure, axes = style.new_figure()
    colours, _ = style.colours_of(budgets)
    rows = []
    for budget, colour in zip(budgets, colours, strict=True):
        penalty = overtraining_penalty(study.huber.surface, budget, ratios)
        axes.plot(ratios, penalty, color=colour, label=f"C = {budget:.2g}")
        rows.append(pd.DataFrame({"flops": budget, "ratio": ratios, "excess_loss": penalty}))
    excess = loss - study.huber.surface.frontier_loss(6.0 * params * tokens)
    axes.plot(tokens / params, excess, ".", color="black", alpha=0.4, label="runs")
    axes.axvspan((tokens / params).min(), (tokens / params).max(), color="grey", alpha=0.08, label="D/N of the runs")
    style.log_axes(axes)
    axes.set_ylim(-0.02, 1.2 * np.quantile(np.abs(excess), 0.95) + 0.02)
    axes.set(xlabel="D / N (tokens per parameter)", ylabel=f"loss above the optimum ({study.runs.loss_unit})")
    axes.legend()
    return Drawing(figure, pd.concat(rows, ignore_index=True), "What training away from the optimal D/N costs.")


def repeats(study: Study) -> Drawing:
    table = study.runs.table
    if "unique_tokens" not in table or not (table["tokens"] > 1.001 * table["unique_tokens"]).any():
        raise NotApplicableError("no run repeats data (no unique_tokens below tokens)")
    known = table.dropna(subset=["unique_tokens"])
    params, tokens, unique_each, observed = (
        known[name].to_numpy() for name in ("params", "tokens", "unique_tokens", "loss")
    )
    once = tokens <= 1.001 * unique_each
    try:
        surface = fit_parametric(params[once], tokens[once], observed[once], starts=standard_starts()[::9]).surface
        columns = (params, tokens, unique_each, observed)
        squares, fit = (fit_effective_data(surface, *columns, delta=delta) for delta in (None, HUBER_DELTA))
    except ValueError as error:
        raise NotApplicableError(str(error)) from None
    unique = float(known["unique_tokens"].median())
    epochs = np.geomspace(1.0, 64.0, 60)
    figure, panels = style.new_figure(columns=2)
    sizes = np.quantile(known["params"], [0.1, 0.5, 0.9])
    colours, _ = style.colours_of(sizes)
    rows = []
    for size, colour in zip(sizes, colours, strict=True):
        loss = fit.loss(size, epochs * unique, unique)
        panels[0].plot(epochs, loss, color=colour, label=f"N = {size:.2g}")
        panels[0].plot(epochs, surface.loss(size, epochs * unique), ":", color=colour, linewidth=0.9)
        rows.append(pd.DataFrame({"params": size, "epochs": epochs, "loss": loss}))
    panels[0].plot(known["tokens"] / known["unique_tokens"], known["loss"], ".", color="black", alpha=0.4)
    style.log_axes(panels[0])
    panels[0].set(xlabel=f"epochs over U = {unique:.2g} tokens", ylabel=style.loss_label(study.runs.loss_unit))
    panels[0].legend(title="dotted: were data unique")
    grid = np.geomspace(known["params"].min(), known["params"].max(), 60)
    lines = panels[1].contour(epochs, grid, fit.loss(grid[:, None], epochs * unique, unique), 12, cmap="viridis")
    panels[1].set(xscale="log", yscale="log", xlim=(epochs[0], epochs[-1]), ylim=(grid[0], grid[-1]))
    style.label_contours(panels[1], lines)
    style.log_axes(panels[1], y=True)
    panels[1].set(xlabel="epochs", ylabel=style.PARAMS)
    caption = (
        f"Repeated data, drawn by Huber: {_half_lives(fit)} (as published, arXiv 2305.16264); "
        f"by least squares: {_half_lives(squares)}."
    )
    return Drawing(figure, pd.concat(rows, ignore_index=True), caption)


def _half_lives(fit: EffectiveDataFit) -> str:
    told = (("R_D*", fit.data_half_life, fit.data_interval), ("R_N*", fit.params_half_life, fit.params_interval))
    return ", ".join(f"{name} = {value:.3g} [{ends.low:.3g}, {ends.high:.3g}]" for name, value, ends in told)


def downstream_error(study: Study) -> Drawing:
    """Gadre et al. 2024, figure 1 (right): the average error of downstream tasks follows from the loss."""
    table = study.runs.table
    known = table.dropna(subset=["error"]) if "error" in table else table.iloc[:0]
    if known.empty:
        raise NotApplicableError("no column of downstream errors (`error`, as shares of one)")
    loss, error = known["loss"].to_numpy(), known["error"].to_numpy()
    try:
        law = fit_error_law(loss, error)
        copies = resample_error_law(loss, error, law, replicates=ERROR_REPLICATES, seed=study.options.seed)
    except ValueError as reason:
        raise NotApplicableError(str(reason)) from None
    expected = float(study.huber.surface.frontier_loss(study.options.target))
    x = np.linspace(min(expected, loss.min()), loss.max(), 80)
    low, high = np.quantile(copies(x), [(1 - study.options.level) / 2, (1 + study.options.level) / 2], axis=0)
    figure, axes = style.new_figure()
    colours, mappable = style.colours_of(known["params"])
    axes.fill_between(x, low, high, color="grey", alpha=0.2, linewidth=0)
    label = rf"${law.epsilon:.3f} - {law.k:.3g}\,e^{{-{law.gamma:.2f} L}}$, {study.options.level:.0%} band"
    axes.plot(x, law(x), color="black", label=label)
    axes.scatter(loss, error, c=colours, s=16, zorder=3)
    axes.plot(expected, law(expected), "*", color=style.COLOURS[1], markersize=11, label="frontier at the target")
    figure.colorbar(mappable, ax=axes, label=style.PARAMS)
    axes.set(xlabel=style.loss_label(study.runs.loss_unit), ylabel="downstream error")
    axes.legend(loc="lower right")
    fitted = style.long_table(kind="fit", loss=x, error=law(x), low=low, high=high)
    data = pd.concat([style.long_table(kind="run", loss=loss, error=error), fitted], ignore_index=True)
    return Drawing(figure, data, "Downstream error against loss, Err = eps - k exp(-gamma L) (over-training law).")


def inference(study: Study) -> Drawing:
    surface, target = study.huber.surface, study.options.target
    loss = float(surface.frontier_loss(target))
    demand = np.geomspace(1e9, 1e15, 40)
    models = [inference_optimum(surface, loss, float(tokens)) for tokens in demand]
    figure, panels = style.new_figure(columns=2)
    params, tokens = surface.optimum(target)
    for axes, values, optimum, label in (
        (panels[0], [m.params for m in models], params, style.PARAMS),
        (panels[1], [m.tokens for m in models], tokens, style.TOKENS),
    ):
        axes.plot(demand, values, color=style.COLOURS[0], label=f"loss {loss:.3f} at least cost of a lifetime")
        axes.axhline(optimum, color="black", linestyle="--", linewidth=1.0, label="optimum of training alone")
        style.log_axes(axes, y=True)
        axes.set(xlabel="tokens to be served", ylabel=label)
    panels[0].legend()
    data = style.long_table(
        inference_tokens=demand,
        params=[m.params for m in models],
        tokens=[m.tokens for m in models],
        total_flops=[m.total_flops for m in models],
    )
    return Drawing(figure, data, "The cheapest model over its life, at the loss that the target budget buys.")
