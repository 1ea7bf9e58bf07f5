"""Figures of how far the fit can be trusted: residuals, bootstrap, hold-outs, and what intervals cost."""

import numpy as np
import pandas as pd

from analysis.design import standard_errors
from analysis.figures import style
from analysis.figures.style import Drawing, NotApplicableError
from analysis.study import Study

CORNER = ("A", "B", "E", "alpha", "beta", "params_exponent")
CORNER_LABELS = ("ln A", "ln B", "E", r"$\alpha$", r"$\beta$", "a")


def residuals(study: Study) -> Drawing:
    params, tokens, loss = study.runs.points
    residual = 100 * study.huber.log_residuals
    figure, panels = style.new_figure(columns=2, rows=2, height=2.7)
    axis_values = (study.runs.column("flops"), params, tokens / params)
    labels = (style.flops_label(study.runs.flops_convention), style.PARAMS, "D / N")
    parts = panels[0].violinplot(residual, vert=False, showmedians=True, widths=0.8)
    for body in parts["bodies"]:
        body.set_facecolor(style.COLOURS[0])
    # One diverged run must not flatten all others: beyond the span it is a triangle at the edge of every panel.
    span = min(1.1 * np.abs(residual).max(), 4.0 * np.quantile(np.abs(residual), 0.97))
    beyond, shown = np.abs(residual) > span, np.clip(residual, -span, span)
    panels[0].plot(shown, np.full(len(residual), 1.0), "|", color="black", markersize=6, alpha=0.5)
    panels[0].set(yticks=[], xlabel="100 ln(L / fit)")
    for axes, values, label in zip(panels[1:], axis_values, labels, strict=True):
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.plot(values[~beyond], residual[~beyond], "o", color=style.COLOURS[0], markersize=3, alpha=0.7)
        axes.scatter(values[beyond], shown[beyond], marker="^", color=style.COLOURS[1], s=20, clip_on=False, zorder=3)
        style.log_axes(axes)
        axes.set(xlabel=label, ylabel="100 ln(L / fit)")
        axes.set_ylim(-span, span)
    panels[0].set_xlim(-span, span)
    data = style.long_table(params=params, tokens=tokens, loss=loss, log_residual=study.huber.log_residuals)
    far = f" Triangles: {beyond.sum()} runs beyond the axes." if beyond.any() else ""
    return Drawing(figure, data, f"Residuals of approach 3; a trend means that the form does not fit there.{far}")


def bootstrap(study: Study) -> Drawing:
    values = np.stack([getattr(study.replicates, name) for name in CORNER], axis=1)
    with np.errstate(divide="ignore"):
        values[:, :2] = np.log(values[:, :2])
    values = values[np.isfinite(values).all(axis=1)]
    point = np.array([getattr(study.huber.surface, name) for name in CORNER])
    point[:2] = np.log(point[:2])
    count = len(CORNER)
    figure, panels = style.new_figure(columns=count, rows=count, width=1.5, height=1.25)
    for row in range(count):
        for column in range(count):
            axes = panels[row * count + column]
            if column > row:
                axes.set_visible(False)
                continue
            if row == column:
                # Without noise all replicates are the same to rounding, and have no 30 bins of their own.
                pad = 1e-6 * abs(point[row])
                ends = (values[:, row].min() - pad, values[:, row].max() + pad)
                axes.hist(values[:, row], bins=30, range=ends, color=style.COLOURS[0], alpha=0.7)
                axes.axvline(point[row], color="black", linewidth=1.0)
                axes.set_yticks([])
            else:
                axes.plot(values[:, column], values[:, row], ".", color=style.COLOURS[0], markersize=1.2, alpha=0.35)
                axes.plot(point[column], point[row], "+", color="black", markersize=8)
            axes.tick_params(labelsize=6, labelbottom=row == count - 1, labelleft=column == 0 and row > 0)
            axes.locator_params(nbins=3)
            if row == count - 1:
                axes.set_xlabel(CORNER_LABELS[column])
            if column == 0 and row > 0:
                axes.set_ylabel(CORNER_LABELS[row])
    data = pd.DataFrame(values, columns=["log_A", "log_B", *CORNER[2:]])
    return Drawing(figure, data, f"Bootstrap of {study.bootstrap}: parameters of approach 3; crosses: the fit.")


def hold_out(study: Study) -> Drawing:
    if not study.hold_outs:
        raise NotApplicableError("too few runs below any cut to hold out the budgets above it")
    params, tokens, loss = study.runs.points
    figure, panels = style.new_figure(columns=2)
    last = study.hold_outs[-1]
    held = 6.0 * params * tokens > 1.05 * last.cut
    fitted = loss * np.exp(-study.huber.log_residuals)
    panels[0].plot(fitted[~held], loss[~held], "o", color=style.COLOURS[0], markersize=3, label="fitted")
    predicted = loss[held] * (1.0 + last.errors)
    panels[0].plot(
        predicted, loss[held], "o", mfc="none", color=style.COLOURS[1], label=f"held out, C > {last.cut:.2g}"
    )
    ends = [min(loss.min(), fitted.min()), np.quantile(loss, 0.97)]
    panels[0].plot(ends, ends, color="black", linewidth=0.8)
    panels[0].set(
        xlabel="predicted " + style.loss_label(study.runs.loss_unit),
        ylabel="actual " + style.loss_label(study.runs.loss_unit),
        xlim=ends,
        ylim=ends,
    )
    panels[0].legend()
    rows = []
    colours, _ = style.colours_of([h.cut for h in study.hold_outs])
    for result, colour in zip(study.hold_outs, colours, strict=True):
        gap, error = result.flops / result.cut, 100 * result.errors
        panels[1].plot(gap, error, "o", mfc="none", color=colour,
                       label=f"C <= {result.cut:.2g}: mean {100 * result.mean_error:.2f}%")  # fmt: skip
        rows.append(pd.DataFrame({"cut": result.cut, "flops": result.flops, "error": result.errors}))
    panels[1].axhline(0.0, color="black", linewidth=0.8)
    style.log_axes(panels[1])
    panels[1].set(xlabel="C / largest fitted C", ylabel="error of the prediction (%)")
    panels[1].legend()
    return Drawing(figure, pd.concat(rows, ignore_index=True), "Predictions of runs above each cut (hollow).")


def cost_of_certainty(study: Study) -> Drawing:
    """Delta-method interval of a as the runs are added from the cheapest up."""
    params, tokens, _ = study.runs.points
    order = np.argsort(params * tokens)
    noise = study.projection.residual_sd
    counts = np.unique(np.geomspace(8, len(order), 30).astype(int)) if len(order) > 8 else np.array([len(order)])
    spent = np.cumsum(6.0 * (params * tokens)[order])
    surface, target = study.huber.surface, study.options.target
    errors = [standard_errors(surface, params[order[:n]], tokens[order[:n]], target, noise) for n in counts]
    widths = 2 * 1.96 * np.array(errors)
    known = np.isfinite(widths).all(axis=1)
    if not known.any():
        raise NotApplicableError("these runs cannot tell the parameters of the law apart")
    counts, widths = counts[known], widths[known]
    figure, panels = style.new_figure(columns=2)
    for axes, width, label in zip(panels, widths.T, ("exponent a", "ln N*(target)"), strict=True):
        axes.plot(spent[counts - 1], width, "o-", color=style.COLOURS[0], markersize=3)
        style.log_axes(axes, y=True)
        axes.set(xlabel="FLOPs of the runs, cheapest first", ylabel=f"width of the 95% interval of {label}")
    data = style.long_table(runs=counts, flops=spent[counts - 1], exponent_width=widths[:, 0], log_n_width=widths[:, 1])
    return Drawing(figure, data, f"What certainty costs, with noise of {noise:.2g} in the loss (delta method).")
