"""What all figures share: fonts and sizes fit for print, log axes with 10^k ticks, and how curves are coloured."""

from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
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
MARKERS = "os^Dv<>P"
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
    """One colour a value, on a log scale, and the mappable for a colour bar."""
    values = np.asarray(values, dtype=np.float64)
    low, high = values.min(), values.max()
    mappable = mpl.cm.ScalarMappable(LogNorm(low, high if high > low else low * 1.01), name)
    return mappable.to_rgba(values), mappable


def mark_target(axes: Axes, target: float) -> None:
    """A dotted line at the target, named at the foot of the axes, where curves that rise to it leave room."""
    axes.axvline(target, color="black", linestyle=":", linewidth=1.0)
    axes.annotate("target", (target, 0.03), (-3, 0), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                  rotation=90, ha="right", va="bottom", fontsize=7.5)  # fmt: skip


def name_curve(axes: Axes, x: float, y: float, text: str) -> None:
    """The name of a curve to the right of its end (x, y)."""
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=6.5, annotation_clip=True)


def label_contours(axes: Axes, lines) -> None:
    """The level of each contour where it passes nearest to the middle of the axes, and never at their edges."""
    places = []
    for segments in lines.allsegs:
        points = np.concatenate([segment for segment in segments if len(segment)] or [np.empty((0, 2))])
        if len(points):
            spread = axes.transAxes.inverted().transform(axes.transData.transform(points)) - 0.5
            nearest = int(np.argmin(np.abs(spread).max(axis=1)))
            if np.abs(spread[nearest]).max() < 0.42:
                places.append(tuple(points[nearest]))
    axes.clabel(lines, fmt="%.2f", fontsize=6.5, manual=places)


def band(axes: Axes, x, replicates_KX, level: float, colour) -> None:
    """Shade the pointwise interval of replicates."""
    low, high = np.nanquantile(replicates_KX, [(1 - level) / 2, (1 + level) / 2], axis=0)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def long_table(**columns) -> pd.DataFrame:
    """Columns side by side; a scalar fills its column."""
    return pd.DataFrame({name: value if np.ndim(value) == 0 else np.asarray(value) for name, value in columns.items()})
