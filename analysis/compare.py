"""Compare runs: one table sorted by validation loss with only the columns that differ, and their loss curves."""

from dataclasses import dataclass

import matplotlib as mpl
import pandas as pd

from analysis.checks import note_validation_sets
from analysis.columns import loss_unit
from analysis.figures import style
from analysis.figures.style import Drawing
from analysis.records import RunRecord, choose_loss, table_of

# Outcomes are shown whether or not they differ; of everything else only what does.
OUTCOMES = ("loss", "loss_stderr", "tokens", "flops", "status")


@dataclass(frozen=True)
class Comparison:
    table: pd.DataFrame  # rising loss; the first column is `run`
    loss_name: str
    drawing: Drawing
    notes: tuple[str, ...] = ()


def compare(records: list[RunRecord], loss: str | None = None) -> Comparison:
    """Raises ValueError when no run has logged the loss."""
    loss_name = choose_loss(records, loss)
    table = table_of(records, loss_name).assign(flops=lambda t: t["flops_exact"].fillna(t["flops_6nd"]))
    if table["loss"].isna().all():
        logged = sorted({key for record in records for row in record.history for key in row if key.endswith("loss")})
        raise ValueError(f"no run logs {loss_name} (logged: {', '.join(logged) or 'no loss'}): choose with --loss=NAME")
    notes: list[str] = []
    note_validation_sets(table, notes)
    rest = [c for c in table.columns if c not in ("run", *OUTCOMES, "loss_kind", "trunk") and _differs(table[c])]
    kept = ["run", *(c for c in OUTCOMES if table[c].notna().any()), *rest]
    ordered = table[kept].sort_values("loss", na_position="last").reset_index(drop=True)
    return Comparison(ordered, loss_name, _draw(records, ordered, loss_name), tuple(notes))


def _differs(column: pd.Series) -> bool:
    return column.map(str).nunique(dropna=False) > 1


def _draw(records: list[RunRecord], table: pd.DataFrame, loss_name: str) -> Drawing:
    by_name = {record.name: record for record in records}
    colours = [mpl.colormaps["viridis"](i / max(len(table) - 1, 1)) for i in range(len(table))]
    with mpl.rc_context(style.RC):
        figure, panels = style.new_figure(columns=2)
        rows = []
        for name, colour in zip(table["run"], colours, strict=True):
            series = by_name[name].series(loss_name)
            if len(series) < 3:
                series = by_name[name].series("train/loss")
            for axes, column in zip(panels, ("tokens", "flops"), strict=True):
                axes.plot(series[column], series["loss"], color=colour, label=name, linewidth=1.0)
            rows.append(series.assign(run=name))
        for axes, label in zip(panels, (style.TOKENS, style.FLOPS), strict=True):
            style.log_axes(axes)
            axes.set(xlabel=label, ylabel=style.loss_label(loss_unit(loss_name)))
        if len(table) <= 15:
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", title="by rising loss")
    return Drawing(figure, pd.concat(rows, ignore_index=True), f"Loss curves ({loss_name}).")


def as_text(table: pd.DataFrame, most: int = 50) -> str:
    """The table for a terminal: short column names, four digits."""
    short = table.head(most).rename(columns=lambda name: str(name).removeprefix("config."))
    return short.to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="-")
