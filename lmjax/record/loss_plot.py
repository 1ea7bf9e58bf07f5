"""The picture of a run: its losses over tokens."""

import io
import threading
from collections.abc import Sequence

import numpy as np

from lmjax.record.history import Record

_drawing = threading.Lock()
"""Matplotlib is for one thread at a time, and runs that train together may end together."""


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over a fiftieth of the run, less at its start, where the loss falls fast.

    Non-finite values are left out.
    """
    total = weight = 0.0
    smoothed = []
    for number, value in enumerate(values, 1):
        decay = 1 - 1 / max(1.0, min(number / 5, len(values) / 50))
        if np.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        smoothed.append(total / weight if weight else float("nan"))
    return smoothed


def plot_loss(record: Record) -> bytes:
    """PNG of training loss (faint, and smoothed) and validation losses over tokens."""
    with _drawing:
        return _plotted(record)


def _plotted(record: Record) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    training = record.series("train/loss")
    smoothed = smooth([loss for *_, loss in training])
    if training:
        tokens = [count for _, count, _ in training]
        axes.plot(tokens, [loss for *_, loss in training], color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(tokens, smoothed, color="C0", linewidth=1.6, label="train (smoothed)")
    levels = smoothed[len(smoothed) // 50 :]
    for number, name in enumerate(record.validation_sets, 1):
        for family, what, style in (("val", "", "o-"), ("val_full", ", whole set", "D")):
            if points := record.series(f"{family}/{name}/loss"):
                label = f"validation: {name}{what}, {points[-1][2]:.3f} at the end"
                style = f"C{number}{style}"
                axes.plot([t for _, t, _ in points], [x for *_, x in points], style, markersize=4, label=label)
                levels += [loss for *_, loss in points]
    levels = [level for level in levels if np.isfinite(level)]
    if levels:  # the first few steps start so high that they would flatten the rest
        margin = 0.05 * (max(levels) - min(levels)) + 1e-3
        axes.set_ylim(min(levels) - 2 * margin, max(levels) + margin)
        axes.legend(frameon=False)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(record.workdir.name)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
