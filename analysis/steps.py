"""Tables whose rows are logged steps: the curves in them, and the one row of each run that counts.

A point in the middle of training is no run of its own: its learning rate has not decayed, so its loss is too high.
"""

import numpy as np
import pandas as pd

CURVE_COLUMNS = ["run", "step", "tokens", "flops", "loss"]
# Runs of as many rows are curves, whatever their steps are called.
ROWS_OF_CURVE = 10
# No sweep trains one size for so many durations (apart by 1% or more); a log of its losses has them.
DURATIONS_OF_CURVE = 30
FALLING = -0.3


def last_steps(table: pd.DataFrame, notes: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows, history): of a table of logged steps each run's last with a loss, and all; a table of runs, twice."""
    table = _with_step(table)
    named = {"run", "step"} <= set(table)
    if not named or not table["run"].duplicated().any() or table.duplicated(["run", "step"]).any():
        return table, table
    notes.append(f"{len(table)} rows are steps of {table['run'].nunique()} runs: each run's last loss counts")
    order = table.assign(known=table["loss"].notna()).sort_values(["known", "step"])
    return order.groupby("run").tail(1).sort_index().drop(columns="known"), table


def _with_step(table: pd.DataFrame) -> pd.DataFrame:
    """Where runs have many rows each, tokens or FLOPs tell their order when no column of steps does."""
    if "step" in table or len(table) < ROWS_OF_CURVE * table["run"].nunique():
        return table
    clock = next((name for name in ("steps", "tokens", "flops") if name in table and table[name].notna().all()), None)
    return table if clock is None else table.assign(step=table[clock])


def refuse_curves(table: pd.DataFrame, told_apart: bool, source: str) -> None:
    """Raises ValueError when rows taken for runs are points of loss curves: few sizes, many rising D, falling losses.

    `told_apart` says that the table names its runs: rows of different names are then runs.
    """
    by_size = table[["params", "tokens", "loss"]].groupby("params")
    durations = by_size["tokens"].agg(lambda tokens: len(np.unique(np.floor(100 * np.log(tokens)))))
    if table.empty or (told_apart and table["run"].is_unique) or durations.median() < DURATIONS_OF_CURVE:
        return
    long = [rows for _, rows in by_size if min(rows["tokens"].nunique(), rows["loss"].nunique()) > 2]
    falls = [np.corrcoef(rows["tokens"].rank(), rows["loss"].rank())[0, 1] for rows in long]
    if falls and np.median(falls) < FALLING:
        raise ValueError(
            f"{source}: {len(table)} rows of {len(durations)} sizes, each at {durations.median():.0f} D or so with "
            "falling losses, are points of loss curves, not finished runs: name the columns that tell runs apart with "
            "--columns=run=COLUMN (or run=COLUMN+COLUMN)"
        )


def curves_of(history: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The logged losses in a table of steps; FLOPs follow the tokens where a step has none of its own."""
    if len(history) == len(table) or not {"run", "step", "tokens"} <= set(history):
        return pd.DataFrame(columns=CURVE_COLUMNS)
    curves = history[history["run"].isin(table["run"])].dropna(subset=["loss", "tokens"])
    ends = table.set_index("run")[["flops", "tokens"]].loc[curves["run"]].reset_index(drop=True)
    derived = (ends["flops"] / ends["tokens"]).to_numpy() * curves["tokens"].to_numpy()
    flops = curves["flops"].fillna(pd.Series(derived, curves.index)) if "flops" in curves else derived
    return curves.assign(flops=flops)[CURVE_COLUMNS].reset_index(drop=True)
