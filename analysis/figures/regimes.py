"""Figures beyond the compute optimum: over-training, repeated data, hyperparameters, inference."""

import numpy as np
import pandas as pd

from analysis.figures import style
from analysis.figures.style import Drawing, NotApplicableError
from analysis.hyperparameters import fit_hyperparameter_law
from analysis.inference import inference_optimum
from analysis.overtraining import overtraining_penalty
from analysis.parametric import fit_parametric, standard_starts
from analysis.repeats import fit_effective_data
from analysis.study import Study

MOST_SLICES = 8
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
    axes.set(xlabel=style.flops_label(study.runs.flops_convention), ylabel=f"L - E (nats), E = {law.E:.3f}")
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
    axes.set(xlabel="D / N (tokens per parameter)", ylabel="loss above the optimum of the budget (nats)")
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
        fit = fit_effective_data(surface, params, tokens, unique_each, observed)
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
    panels[0].set(xlabel=f"epochs over U = {unique:.2g} tokens", ylabel=style.LOSS)
    panels[0].legend(title="dotted: were data unique")
    grid = np.geomspace(known["params"].min(), known["params"].max(), 60)
    lines = panels[1].contour(epochs, grid, fit.loss(grid[:, None], epochs * unique, unique), 12, cmap="viridis")
    panels[1].clabel(lines, fmt="%.2f", fontsize=6.5)
    style.log_axes(panels[1], y=True)
    panels[1].set(xlabel="epochs", ylabel=style.PARAMS)
    low, high = fit.data_interval.low, fit.data_interval.high
    caption = (
        f"Repeated data: R_D* = {fit.data_half_life:.3g} [{low:.3g}, {high:.3g}], R_N* = {fit.params_half_life:.3g}."
    )
    return Drawing(figure, pd.concat(rows, ignore_index=True), caption)


def hyperparameters(study: Study) -> Drawing:
    table = study.runs.table
    if "learning_rate" not in table or table["learning_rate"].nunique() < 3:
        raise NotApplicableError("fewer than three learning rates")
    known = table.dropna(subset=["learning_rate"])
    try:
        law = fit_hyperparameter_law(*(known[c] for c in ("params", "tokens", "learning_rate", "loss")))
    except ValueError as error:
        raise NotApplicableError(str(error)) from None
    figure, panels = style.new_figure(columns=2)
    _learning_rate_slices(panels[0], known)
    for cell in law.cells:
        panels[1].plot(
            cell.params, cell.value, "o", mfc="none" if cell.flag else style.COLOURS[0], color=style.COLOURS[0]
        )
    sizes = np.geomspace(min(c.params for c in law.cells), max(c.params for c in law.cells), 20)
    tokens = float(np.exp(np.mean([np.log(c.tokens) for c in law.cells])))
    label = f"$N^{{{law.params_exponent:.2f}}} D^{{{law.tokens_exponent:.2f}}}$ at D = {tokens:.2g}"
    panels[1].plot(sizes, law(sizes, tokens), color="black", label=label)
    style.log_axes(panels[1], y=True)
    panels[1].set(xlabel=style.PARAMS, ylabel="near-optimal learning rate")
    panels[1].legend()
    data = pd.DataFrame([vars(cell) for cell in law.cells])
    return Drawing(figure, data, "Best learning rates; hollow: at the edge of the values tried, not fitted.")


def _learning_rate_slices(axes, known) -> None:
    """Loss over learning rate x batch where batches vary, else one curve a cell."""
    if "batch_tokens" in known and known["batch_tokens"].nunique() >= 3:
        points = axes.scatter(known["learning_rate"], known["batch_tokens"], c=known["loss"], cmap="viridis_r", s=40)
        best = known.loc[known["loss"].idxmin()]
        axes.plot(best["learning_rate"], best["batch_tokens"], "*", color="black", markersize=12)
        axes.figure.colorbar(points, ax=axes, label=style.LOSS)
        style.log_axes(axes, y=True)
        axes.set(xlabel="learning rate", ylabel="batch (tokens)")
        return
    cells = list(known.groupby(["params", "tokens"]))
    cells = cells[:: -(-len(cells) // MOST_SLICES)]
    colours, _ = style.colours_of([key[0] for key, _ in cells])
    for (key, cell), colour in zip(cells, colours, strict=True):
        cell = cell.sort_values("learning_rate")
        axes.plot(
            cell["learning_rate"],
            cell["loss"] / cell["loss"].min(),
            "o-",
            color=colour,
            label=f"N {key[0]:.2g}, D {key[1]:.2g}",
        )
    style.log_axes(axes)
    axes.set(xlabel="learning rate", ylabel="loss / lowest of its (N, D)")
    axes.set_ylim(top=1.0 + 1.7 * (axes.get_ylim()[1] - 1.0))  # room for the legend
    axes.legend(loc="upper center", ncols=2)


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
