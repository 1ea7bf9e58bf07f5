"""Figures of learning rate and batch size: what was tried at each (N, D), and the laws of what was best."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.figures import style
from analysis.figures.style import Drawing, NotApplicableError
from analysis.hyperparameters import HyperparameterLaw, cells_of
from analysis.study import Study

LABELS = {"learning_rate": "learning rate", "batch_tokens": "batch (tokens)"}
MOST_SLICES, MOST_MAPS = 8, 6
# Losses this much above the lowest of the cell, in percent, all have the last colour.
LARGEST_EXCESS = 3.0


def learning_rate_batch(study: Study) -> Drawing:
    """Loss over learning rate and batch in up to six cells, smallest to largest."""
    cells = [cell for cell in _cells(study, list(LABELS)) if cell[[*LABELS]].nunique().min() >= 3]
    if not cells:
        raise NotApplicableError("no (N, D) at which three learning rates and three batch sizes were tried")
    chosen = [cells[i] for i in np.unique(np.linspace(0, len(cells) - 1, MOST_MAPS).round().astype(int))]
    columns = min(3, len(chosen))
    figure, panels = style.new_figure(columns=columns, rows=-(-len(chosen) // columns), width=4.4, height=3.1)
    rows = []
    for axes, cell in zip(np.atleast_1d(panels), chosen, strict=False):
        colours = _heat_map(axes, cell, study.options.near_optimal)
        axes.set_title(
            f"N {cell['params'].iloc[0]:.2g}, D {cell['tokens'].iloc[0]:.2g}, lowest {cell['loss'].min():.3f}"
        )
        rows.append(cell[["params", "tokens", "learning_rate", "batch_tokens", "loss"]])
    for axes in np.atleast_1d(panels)[len(chosen) :]:
        axes.set_visible(False)
    figure.colorbar(colours, ax=panels, label="loss above the lowest of the cell (%)", extend="max")
    near = f"{100 * study.options.near_optimal:g}%"
    caption = f"Loss by learning rate and batch; star: the lowest, lines: {near} and 1% above it."
    return Drawing(figure, pd.concat(rows, ignore_index=True), caption)


def _heat_map(axes: Axes, cell: pd.DataFrame, near_optimal: float):
    grid = cell.pivot_table(index="batch_tokens", columns="learning_rate", values="loss", aggfunc="mean")
    rates, batches = grid.columns.to_numpy(), grid.index.to_numpy()
    excess = np.ma.masked_invalid(100 * (grid.to_numpy() / np.nanmin(grid.to_numpy()) - 1.0))
    colours = axes.pcolormesh(
        _edges(rates), _edges(batches), excess, cmap="viridis_r", vmin=0.0, vmax=min(LARGEST_EXCESS, excess.max())
    )
    if excess.max() > 100 * near_optimal:
        axes.contour(
            rates, batches, excess, levels=sorted({100 * near_optimal, 1.0}), colors="white", linewidths=(1.4, 0.8)
        )
    row, column = np.unravel_index(excess.argmin(), excess.shape)
    axes.plot(rates[column], batches[row], "*", color=style.COLOURS[1], markeredgecolor="black", markersize=12)
    axes.grid(visible=False)
    style.log_axes(axes, y=True)
    axes.set(xlabel=LABELS["learning_rate"], ylabel=LABELS["batch_tokens"])
    return colours


def _edges(values: np.ndarray) -> np.ndarray:
    """Borders of log-spaced tiles around the values."""
    logs = np.log(values)
    middles = 0.5 * (logs[1:] + logs[:-1])
    return np.exp(np.concatenate([[2 * logs[0] - middles[0]], middles, [2 * logs[-1] - middles[-1]]]))


def hyperparameters(study: Study) -> Drawing:
    """For each setting with a law: slices through the cells, and the optima against N and against D."""
    if not study.settings:
        raise NotApplicableError(
            "; ".join(f"no {name}: {why}" for name, why in study.absent.items() if "law of" in name)
        )
    figure, panels = style.new_figure(columns=3, rows=len(study.settings), width=4.6, height=3.4)
    rows = []
    for place, (name, law) in enumerate(study.settings.items()):
        slices, *optima = panels[3 * place : 3 * place + 3]
        _slices(slices, _cells(study, [name]), name)
        for axes, axis, other, label in (
            (optima[0], "params", "tokens", style.PARAMS),
            (optima[1], "tokens", "params", style.TOKENS),
        ):
            _optima(axes, study, law, name, axis, other)
            axes.set(xlabel=label, ylabel=f"near-optimal {LABELS[name]}")
        rows.append(pd.DataFrame([vars(cell) for cell in law.cells]).drop(columns="near").assign(setting=name))
    caption = "Near-optimal settings; hollow: at the edge of the values tried, not fitted. Stars: at the target."
    return Drawing(figure, pd.concat(rows, ignore_index=True), caption)


def _cells(study: Study, names: list[str]) -> list[pd.DataFrame]:
    """The runs of each (N, D) that say what their settings were, by rising N, then D."""
    known = study.trials.table.dropna(subset=[name for name in names if name in study.trials.table])
    if not set(names) <= set(known) or known.empty:
        return []
    cells = [cell for _, cell in known.groupby(cells_of(known["params"], known["tokens"]))]
    return sorted(cells, key=lambda cell: (cell["params"].iloc[0], cell["tokens"].iloc[0]))


def _slices(axes: Axes, cells: list[pd.DataFrame], name: str) -> None:
    """The lowest loss at each value of one setting, over that of its cell."""
    cells = cells[:: -(-len(cells) // MOST_SLICES)]
    colours, _ = style.colours_of([cell["params"].iloc[0] for cell in cells])
    for cell, colour in zip(cells, colours, strict=True):
        lowest = cell.groupby(name)["loss"].min()
        label = f"{cell['params'].iloc[0]:.2g}, {cell['tokens'].iloc[0]:.2g}"
        axes.plot(lowest.index, 100 * (lowest / lowest.min() - 1.0), "o-", color=colour, label=label)
    style.log_axes(axes)
    axes.set(xlabel=LABELS[name], ylabel="loss above the lowest of its cell (%)")
    axes.set_ylim(top=1.6 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper center", ncols=2, title="N, D")


def _optima(axes: Axes, study: Study, law: HyperparameterLaw, name: str, axis: str, other: str) -> None:
    """Optima of the cells against one size; the law at three values of the other, in the colours of its points."""
    x, others = (np.array([getattr(cell, size) for cell in law.cells]) for size in (axis, other))
    levels = np.unique(np.quantile(others, [0.0, 0.5, 1.0], method="nearest"))
    colours, _ = style.colours_of([*others, *levels])
    for cell, value, colour in zip(law.cells, x, colours, strict=False):
        axes.plot(value, cell.value, "o", color=colour, mfc="none" if cell.flag else colour)
    estimate = study.estimates[0]
    target = getattr(estimate, axis).value
    grid = np.geomspace(x.min(), max(x.max(), target), 20)
    short = {"params": "N", "tokens": "D"}[other]
    lines = [(level, colour, f"{short} = {level:.2g}") for level, colour in zip(levels, colours[len(x) :], strict=True)]
    if {"params": law.params_exponent, "tokens": law.tokens_exponent}[other] == 0:
        lines = [(levels[0], "black", f"any {short}")]
    for level, colour, label in lines:
        sizes = (grid, level) if axis == "params" else (level, grid)
        axes.plot(grid, law(*sizes), color=colour, label=label)
    quantity = getattr(estimate, name)
    reach = [[quantity.value - quantity.interval.low], [quantity.interval.high - quantity.value]]
    axes.errorbar(target, quantity.value, reach, fmt="*", color=style.COLOURS[1], markersize=10, capsize=3)
    style.log_axes(axes, y=True)
    powers = {"N": law.params_exponent, "D": law.tokens_exponent}
    title = "$" + " ".join(f"{axis}^{{{powers[axis]:.2f}}}" for axis in law.regressors.split(", ")) + "$"
    axes.legend(title=title, frameon=True, framealpha=0.8, edgecolor="none")
