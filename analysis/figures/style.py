"""What all figures share: fonts and sizes fit for print, log axes with 10^k ticks, and how curves are coloured."""

from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

RC: Any = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,
}
PARAMS, TOKENS, FLOPS = "N (parameters)", "D (tokens)", "C (FLOPs)"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")  # Okabe & Ito
METHOD_COLOURS = {
    "approach 1 (envelope)": COLOURS[3],
    "approach 2 (parabola)": COLOURS[1],
    "approach 2 (akima)": COLOURS[4],
    "approach 3 (Huber)": COLOURS[0],
    "approach 3 (LAD)": COLOURS[5],
    "variable projection": COLOURS[2],
}


class NotApplicableError(Exception):
    """This table of runs lacks what the figure shows; the message says what."""


@dataclass(frozen=True)
class Drawing:
    """A figure and the numbers behind it."""

    figure: Figure
    data: pd.DataFrame
    caption: str


def new_figure(columns: int = 1, rows: int = 1, width: float = 5.2, height: float = 3.8):
    """A figure and its axes in a row-major list (one Axes when there is only one)."""
    size = (width * (1.0 if columns == 1 else 0.85 * columns), height * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    return figure, axes[0] if len(axes) == 1 else axes


def log_axes(axes: Axes, x: bool = True, y: bool = False) -> None:
    """Make axes logarithmic, after plotting: 10^k ticks, or 1, 2, 5 where the data span less than two decades."""
    if x:
        axes.set_xscale("log")
        _ticks(axes.xaxis, axes.get_xlim())
    if y:
        axes.set_yscale("log")
        _ticks(axes.yaxis, axes.get_ylim())


def _ticks(axis, limits: tuple[float, float]) -> None:
    axis.set_minor_formatter(NullFormatter())
    if np.log10(limits[1] / limits[0]) < 2.0:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(_tick_label))


def _tick_label(value: float, _=None) -> str:
    """0.001 to 9999 as they are, others as 5 x 10^k."""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"$10^{{{int(exponent)}}}$" if mantissa == "1" else rf"${mantissa}\times10^{{{int(exponent)}}}$"


def loss_label(unit: str) -> str:
    return f"loss ({unit})"


def flops_label(convention: str) -> str:
    return f"{FLOPS}, {convention}"


def colours_of(values, name: str = "viridis"):
    """One colour a value, on a log scale, and the mappable for a colour bar; the map without its pale yellow end."""
    values = np.asarray(values, dtype=np.float64)
    low, high = values.min(), values.max()
    colours = ListedColormap(mpl.colormaps[name](np.linspace(0.0, 0.92, 256)))
    mappable = mpl.cm.ScalarMappable(LogNorm(low, high if high > low else low * 1.01), colours)
    return mappable.to_rgba(values), mappable


def band(axes: Axes, x, replicates_KX, level: float, colour) -> None:
    """Shade the pointwise interval of replicates."""
    low, high = np.nanquantile(replicates_KX, [(1 - level) / 2, (1 + level) / 2], axis=0)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def long_table(**columns) -> pd.DataFrame:
    """Columns side by side; a scalar fills its column."""
    return pd.DataFrame({name: value if np.ndim(value) == 0 else np.asarray(value) for name, value in columns.items()})
