"""One tidy table of runs from any source, checked before anything is fitted to it.

    load_runs("sweep.csv")                      CSV or parquet, one run a row, or one logged step of a run a row
    load_runs("workdirs/")                      training work directories, or offline wandb directories
    load_runs("wandb:entity/project")           wandb, cached

Everything numeric is float64: as int64, 6 N D turns negative beyond 9.2e18 FLOPs.
"""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.checks import (
    check_labels,
    check_one_convention,
    check_units,
    exclude_unfinished,
    invalid_rows,
    note_copies,
    note_validation_sets,
)
from analysis.columns import canonical, find_column, listed, loss_unit
from analysis.hyperparameters import cells_of
from analysis.records import RunRecord, choose_loss, table_of
from analysis.sources import read_records
from analysis.steps import CURVE_COLUMNS, curves_of, last_steps, refuse_curves
from analysis.surface import FLOPS_PER_PARAM_TOKEN

# Which N and C a fit uses: the flag's value -> the column.
PARAM_COUNTS = {
    "total": "params_total",
    "non_embedding": "params_non_embedding",
    "matmul": "params_matmul",
    "active": "params_active",
}
FLOP_COUNTS = {"6nd": "flops_6nd", "exact": "flops_exact"}
# What runs of one (N, D) may differ in, and some be better for; seeds are luck.
SETTINGS = ("learning_rate", "batch_tokens", "schedule")


@dataclass(frozen=True)
class Exclusion:
    reason: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Runs:
    """The table and where it comes from.

    `table` has float64 columns params (N), tokens (D), flops (C), loss, and as many other canonical columns as the
    source has; `curves` has run, step, tokens, flops, loss of every logged loss (empty without histories). `stages` are
    the parts of a table with a `stage` column, in its order, ending with this one; empty for other tables. `notes` says
    what was derived or looked odd.
    """

    table: pd.DataFrame
    curves: pd.DataFrame
    source: str
    params_convention: str
    flops_convention: str
    loss_name: str
    sha256: str
    exclusions: tuple[Exclusion, ...] = ()
    notes: tuple[str, ...] = field(default=())
    loss_unit: str = "nats per token"
    stages: dict[str, "Runs"] = field(default_factory=dict)

    def column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()

    @property
    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(params, tokens, loss), each (runs,)."""
        return self.column("params"), self.column("tokens"), self.column("loss")

    @property
    def sequence_length(self) -> int | None:
        """The tokens of a row, where every run tells and tells the same."""
        names = [name for name in ("sequence_length", "config.data.seq_len") if name in self.table]
        if not names:
            return None
        lengths = pd.to_numeric(self.table[names[0]], errors="coerce").unique()
        told = len(lengths) == 1 and np.isfinite(lengths[0]) and lengths[0] >= 1 and lengths[0] % 1 == 0
        return int(lengths[0]) if told else None

    def tuned(self) -> "Runs":
        """Only the best setting (learning rate, batch, schedule; mean over its seeds) of each (N, D, unique tokens).

        A law of tuned runs is bent by those that tried other settings. Other tables stay as they are.
        """
        settings = [self.table[name] for name in SETTINGS if name in self.table]
        if not settings:
            return self
        cell = [pd.Series(cells_of(self.column("params"), self.column("tokens")), self.table.index)]
        cell += [self.table["unique_tokens"]] if "unique_tokens" in self.table else []
        means = self.table["loss"].groupby([*cell, *settings], dropna=False).transform("mean")
        kept = means <= means.groupby(cell, dropna=False).transform("min") * (1 + 1e-12)
        if kept.all():
            return self
        note = f"{(~kept).sum()} runs tried other settings than the best of their N and D: no law is fitted to them"
        table = self.table[kept].reset_index(drop=True)
        curves = self.curves[self.curves["run"].isin(table["run"])] if "run" in table else self.curves
        return replace(self, table=table, curves=curves, notes=(*self.notes, note))


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Refusals of the fits inside say which table they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(source) else f"{source}: {error}") from None


def load_runs(
    source: str | Path,
    *,
    loss: str | None = None,
    params: str | None = None,
    flops: str | None = None,
    columns: dict[str, str] | None = None,
    where: dict[str, str] | None = None,
    exclude: Collection[str] = (),
    exclude_invalid: bool = False,
    api=None,
) -> Runs:
    """Read, select, check.

    `loss` names the loss column or metric; `params` is a key of PARAM_COUNTS or a column; `flops` a key of FLOP_COUNTS
    or a column; `columns` maps canonical names to the table's; `where` keeps rows whose column equals a value;
    `exclude` drops the runs of these names (rows, from 0, where runs have none), `exclude_invalid` drops unusable rows
    instead of refusing them: both are recorded. Of a table with several values of `stage` the last is returned, with
    all of them as its `stages`.
    Raises ValueError, one line: what is wrong, where, what to do.
    """
    name = str(source)
    raw, records, metric = _read(name, loss, api)
    raw = _select(raw, where or {}, name)
    chosen = {**({"loss": loss} if loss and not records else {}), **(columns or {})}
    notes: list[str] = []
    table = canonical(raw, chosen, notes, name)
    loss_name = metric if records else str(find_column(raw, "loss", chosen))
    unit = loss_unit(loss_name)
    if unit == "perplexity":
        raise ValueError(
            f"{name}: {loss_name!r} is a perplexity, and laws are of its logarithm: add a column with that"
        )
    if "run" not in table:
        table["run"] = table.index.astype(str)
    if unknown := [run for run in exclude if run not in set(table["run"])]:
        raise ValueError(f"{name}: no run is named {', '.join(unknown)}: change --exclude")
    _derive_settings(table, notes)
    parts = dict(list(table.groupby("stage", sort=False))) if "stage" in table else {"": table}
    loaded = {
        stage: _checked(part, exclude, records, params, flops, exclude_invalid, name, loss_name, [*notes])
        for stage, part in parts.items()
    }
    if not records:
        told_apart = "run" in chosen or ("step" not in table and find_column(raw, "run", chosen) is not None)
        for runs in loaded.values():
            refuse_curves(runs.table, told_apart, name)
    loaded = {stage: replace(runs, loss_unit=unit) for stage, runs in loaded.items()}
    return _last_stage(loaded)


def _last_stage(loaded: dict[str, Runs]) -> Runs:
    """The runs of the last stage, with those of all stages beside them, where there are several."""
    last, runs = list(loaded.items())[-1]
    if len(loaded) == 1:
        return runs
    note = f"of {len(loaded)} stages ({', '.join(loaded)}) the laws are those of the last, {last}"
    whole = hashlib.sha256("".join(stage.sha256 for stage in loaded.values()).encode()).hexdigest()
    return replace(runs, stages=loaded, notes=(*runs.notes, note), sha256=whole)


def _derive_settings(table: pd.DataFrame, notes: list[str]) -> None:
    """The batch in tokens from sequences and their length, the unique tokens from epochs, where a table has those."""
    if "batch_tokens" not in table and {"batch_sequences", "sequence_length"} <= set(table):
        table["batch_tokens"] = table["batch_sequences"] * table["sequence_length"]
        notes.append("batch_tokens was derived as batch size x sequence length")
    if "unique_tokens" not in table and {"tokens", "epochs"} <= set(table) and (table["epochs"] > 1.001).any():
        table["unique_tokens"] = table["tokens"] / table["epochs"].clip(lower=1.0)
        notes.append("unique_tokens was derived as tokens / epochs")


def _checked(
    table, exclude, records, params, flops, exclude_invalid, source: str, loss_name: str, notes: list[str]
) -> Runs:
    """The rows of one stage, chosen, checked and completed."""
    names = table["run"]
    named = names.index[names.isin(exclude)]
    table = table.drop(index=named)
    params = "active" if params is None and _is_sparse(table) else params
    params_convention = _choose_count(table, "params", params, PARAM_COUNTS, source)
    flops_convention = _choose_count(table, "flops", flops, FLOP_COUNTS, source)
    check_one_convention(table, source)
    table, history = last_steps(table, notes)
    unfinished = exclude_unfinished(table)
    table = table.drop(index=[i for _, index in unfinished for i in index])
    invalid = invalid_rows(table, exclude_invalid, source)
    table = table.drop(index={i for _, index in invalid for i in index})
    exclusions = [*([("named by --exclude", named)] if len(named) else []), *unfinished, *invalid]
    params_convention, flops_convention = _complete(table, (params_convention, flops_convention), notes, source)
    if not records:
        check_units(table, source)
    check_labels(table, notes, source)
    note_copies(table, notes)
    note_validation_sets(table, notes)
    if table.empty:
        raise ValueError(f"{source}: no usable run is left: {'; '.join(r for r, _ in exclusions) or 'it is empty'}")
    return Runs(
        table=table.reset_index(drop=True),
        curves=_record_curves(records, loss_name, table) if records else curves_of(history, table),
        source=source,
        params_convention=params_convention,
        flops_convention=flops_convention,
        loss_name=loss_name,
        sha256=hashlib.sha256(table.to_csv(index=False).encode()).hexdigest(),
        exclusions=tuple(Exclusion(reason, tuple(dict.fromkeys(names[index]))) for reason, index in exclusions),
        notes=tuple(notes),
    )


def _read(source: str, loss: str | None, api) -> tuple[pd.DataFrame, list[RunRecord], str]:
    if not source.startswith("wandb:") and Path(source).is_file():
        return _read_file(Path(source)), [], ""
    records = read_records([source], api)
    metric = choose_loss(records, loss)
    return table_of(records, metric), records, metric


def _read_file(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else _read_text(path)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a readable CSV or parquet table ({reason}): check the file") from None
    if table.empty:
        raise ValueError(f"{path}: the table has no rows: check the file")
    return table


def _read_text(path: Path) -> pd.DataFrame:
    """Comma-separated, or else by semicolons or tabs."""
    table = pd.read_csv(path)
    other = next((sign for sign in (";", "\t") if len(table.columns) == 1 and sign in table.columns[0]), None)
    return table if other is None else pd.read_csv(path, sep=other)


def _select(raw: pd.DataFrame, where: dict[str, str], source: str) -> pd.DataFrame:
    for column, value in where.items():
        if column not in raw.columns:
            raise ValueError(
                f"{source}: no column {column!r} to select by (it has {listed(raw.columns)}): change --where"
            )
        kept = raw[raw[column].astype(str) == value]
        if kept.empty:
            present = ", ".join(sorted(raw[column].astype(str).unique())[:8])
            raise ValueError(f"{source}: no row has {column}={value} (values: {present}): change --where")
        raw = kept
    return raw


def _is_sparse(table: pd.DataFrame) -> bool:
    """Whether tokens pass through only a part of some run's parameters, as in mixtures of experts: 6ND counts that."""
    if "params" in table or not {"params_active", "params_total"} <= set(table):
        return False
    return bool((table["params_active"] < table["params_total"]).any())


def _choose_count(table: pd.DataFrame, name: str, choice: str | None, counts: dict[str, str], source: str) -> str:
    """Fill `name` with the chosen way of counting; return the convention's name."""
    if choice is not None:
        column = counts.get(choice, choice)
        if column not in table or table[column].isna().all():
            known = ", ".join(key for key, col in counts.items() if col in table) or "none"
            raise ValueError(f"{source}: no {name} counted as {choice!r} (available: {known}): change --{name}")
        table[name] = table[column]
        return choice
    if name in table and table[name].notna().any():
        labels = table["flops_convention"].unique() if name == "flops" and "flops_convention" in table else []
        return str(labels[0]) if len(labels) == 1 else "as labelled"
    for key, column in counts.items():
        if column in table and table[column].notna().any():
            table[name] = table[column]
            return key
    return "absent"


def _complete(table: pd.DataFrame, conventions: tuple[str, str], notes: list[str], source: str) -> tuple[str, str]:
    """Derive the one missing of N, D, C from the other two by C = 6ND; returns how N and C are counted then."""
    absent = [name for name in ("params", "tokens", "flops") if name not in table or table[name].isna().all()]
    if len(absent) > 1:
        raise ValueError(
            f"{source}: needs two of params, tokens, flops; no column for {' and '.join(absent)}: "
            "name them with --columns=params=COLUMN,..."
        )
    for name in absent:
        notes.append(f"{name} was derived by C = 6ND")
    if absent == ["flops"]:
        table["flops"] = FLOPS_PER_PARAM_TOKEN * table["params"] * table["tokens"]
        return conventions[0], "6nd"
    if absent == ["tokens"]:
        table["tokens"] = table["flops"] / (FLOPS_PER_PARAM_TOKEN * table["params"])
    if absent == ["params"]:
        table["params"] = table["flops"] / (FLOPS_PER_PARAM_TOKEN * table["tokens"])
        return "C / 6D", conventions[1]
    return conventions


def _record_curves(records: list[RunRecord], loss: str, table: pd.DataFrame) -> pd.DataFrame:
    """Every logged loss of the runs kept, with FLOPs counted as in the table."""
    flops = dict(zip(table["run"], table["flops"], strict=True))
    series = []
    for record in records:
        if record.name in flops:
            curve = record.series(loss).assign(run=record.name)
            counted = record.final("flops")
            curve["flops"] *= flops[record.name] / counted if counted > 0 else 1.0
            series.append(curve)
    return pd.concat(series, ignore_index=True)[CURVE_COLUMNS]
