"""One tidy table of runs from any source, checked before anything is fitted to it.

    load_runs("sweep.csv")                      CSV or parquet, one run a row
    load_runs("workdirs/")                      training work directories, or offline wandb directories
    load_runs("wandb:entity/project")           wandb, cached

Everything numeric is float64: 6 N D overflows int64 from 1.5e18 FLOPs of 64-bit arithmetic on.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import wandb_runs, workdirs
from analysis.checks import check_labels, check_one_convention, exclude_unfinished, invalid_rows
from analysis.records import RunRecord, choose_loss, table_of
from analysis.surface import FLOPS_PER_PARAM_TOKEN

# Canonical column -> the names it goes by in published tables, lower case, with spaces for underscores.
ALIASES = {
    "run": ("run", "run id", "name", "run name"),
    "params": ("params", "n", "model size", "n params", "num params", "parameters", "model params"),
    "params_total": ("params total", "total params"),
    "params_non_embedding": ("params non embedding", "params no embed", "non embedding params", "n non embedding"),
    "params_matmul": ("params matmul", "matmul params"),
    "tokens": ("tokens", "d", "n tokens", "num tokens", "training tokens", "train tokens"),
    "unique_tokens": ("unique tokens", "u"),
    "flops": ("flops", "c", "training flop", "training flops", "compute", "flop", "total flops"),
    "flops_6nd": ("flops 6nd",),
    "flops_exact": ("flops exact",),
    "flops_convention": ("flops convention", "flop convention"),
    "budget": ("budget", "flops budget", "flop budget"),
    "batch_tokens": ("batch tokens", "batch size tokens"),
    "learning_rate": ("learning rate", "lr", "peak lr", "max lr"),
    "schedule": ("schedule", "decay", "lr schedule"),
    "seed": ("seed",),
    "loss": ("loss", "val loss", "final loss", "validation loss", "final val loss", "l"),
    "loss_kind": ("loss kind", "split"),
    "loss_stderr": ("loss stderr", "val loss stderr"),
    "trunk": ("trunk", "trunk run"),
    "status": ("status",),
}
TEXT = frozenset({"run", "flops_convention", "schedule", "loss_kind", "trunk", "status"})
# Which N and C a fit uses: the flag's value -> the column.
PARAM_COUNTS = {"total": "params_total", "non_embedding": "params_non_embedding", "matmul": "params_matmul"}
FLOP_COUNTS = {"6nd": "flops_6nd", "exact": "flops_exact"}


@dataclass(frozen=True)
class Exclusion:
    reason: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Runs:
    """The table and where it comes from.

    `table` has float64 columns params (N), tokens (D), flops (C), loss (nats per token), and as many other canonical
    columns as the source has; `curves` has run, step, tokens, flops, loss of every logged loss (empty without
    histories). `notes` says what was derived or looked odd.
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

    def column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()

    @property
    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(params, tokens, loss), each (runs,)."""
        return self.column("params"), self.column("tokens"), self.column("loss")


def load_runs(
    source: str | Path,
    *,
    loss: str | None = None,
    params: str | None = None,
    flops: str | None = None,
    columns: dict[str, str] | None = None,
    where: dict[str, str] | None = None,
    exclude_invalid: bool = False,
    api=None,
) -> Runs:
    """Read, select, check.

    `loss` names the loss column or metric; `params` is a key of PARAM_COUNTS or a column; `flops` a key of FLOP_COUNTS
    or a column; `columns` maps canonical names to the table's; `where` keeps rows whose column equals a value;
    `exclude_invalid` drops unusable rows (recorded as exclusions) instead of refusing them.
    Raises ValueError, one line: what is wrong, where, what to do.
    """
    raw, records, loss_name = _read(str(source), loss, api)
    raw = _select(raw, where or {}, str(source))
    chosen = {**({"loss": loss} if loss and not records else {}), **(columns or {})}
    table = _canonical(raw, chosen, str(source))
    notes: list[str] = []
    params_convention = _choose_count(table, "params", params, PARAM_COUNTS, str(source))
    flops_convention = _choose_count(table, "flops", flops, FLOP_COUNTS, str(source))
    check_one_convention(table, str(source))
    exclusions = exclude_unfinished(table)
    table = table.drop(index=[i for _, index in exclusions for i in index])
    exclusions += invalid_rows(table, exclude_invalid, str(source))
    table = table.drop(index=[i for _, index in exclusions for i in index if i in table.index])
    flops_convention = _complete(table, flops_convention, notes, str(source))
    check_labels(table, notes, str(source))
    if table.empty:
        raise ValueError(f"{source}: no usable run is left: {'; '.join(r for r, _ in exclusions) or 'it is empty'}")
    named = _find(raw, "run", chosen)
    names = raw[named] if named else pd.Series(raw.index.astype(str), raw.index)
    return Runs(
        table=table.reset_index(drop=True),
        curves=_curves(records, loss_name, table),
        source=str(source),
        params_convention=params_convention,
        flops_convention=flops_convention,
        loss_name=loss_name if records else chosen.get("loss", "loss"),
        sha256=hashlib.sha256(table.to_csv(index=False).encode()).hexdigest(),
        exclusions=tuple(Exclusion(reason, tuple(str(names[i]) for i in index)) for reason, index in exclusions),
        notes=tuple(notes),
    )


def _read(source: str, loss: str | None, api) -> tuple[pd.DataFrame, list[RunRecord], str]:
    records: list[RunRecord] = []
    if source.startswith("wandb:"):
        records = wandb_runs.read_project(source.removeprefix("wandb:"), api=api)
    else:
        path = Path(source)
        if not path.exists():
            raise ValueError(f"{source}: no such file or directory: check the path")
        if path.is_file():
            return _read_file(path), [], loss or "loss"
        records = [workdirs.read_workdir(folder) for folder in workdirs.find_workdirs(path)]
        records = records or wandb_runs.read_offline(wandb_runs.find_offline(path))
    if not records:
        raise ValueError(f"{source}: holds no metrics.jsonl and no .wandb file: name a directory of runs")
    metric = choose_loss(records, loss)
    return table_of(records, metric), records, metric


def _read_file(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a readable CSV or parquet table ({reason}): check the file") from None
    if table.empty:
        raise ValueError(f"{path}: the table has no rows: check the file")
    return table


def _select(raw: pd.DataFrame, where: dict[str, str], source: str) -> pd.DataFrame:
    for column, value in where.items():
        if column not in raw.columns:
            present = ", ".join(map(str, raw.columns))
            raise ValueError(f"{source}: no column {column!r} to select by (it has {present}): change --where")
        kept = raw[raw[column].astype(str) == value]
        if kept.empty:
            present = ", ".join(sorted(raw[column].astype(str).unique())[:8])
            raise ValueError(f"{source}: no row has {column}={value} (values: {present}): change --where")
        raw = kept
    return raw


def _find(raw: pd.DataFrame, name: str, chosen: dict[str, str]) -> str | None:
    """The source column of a canonical one."""
    if name in chosen:
        return chosen[name] if chosen[name] in raw.columns else None
    found = [str(c) for c in raw.columns if str(c).lower().replace("_", " ").strip() in ALIASES[name]]
    if name in found:
        return name
    return found[0] if found else None


def _canonical(raw: pd.DataFrame, chosen: dict[str, str], source: str) -> pd.DataFrame:
    for name, column in chosen.items():
        if name not in ALIASES:
            raise ValueError(f"{source}: unknown column name {name!r} in --columns: choose from {', '.join(ALIASES)}")
        if column not in raw.columns:
            raise ValueError(f"{source}: no column {column!r} for {name} (it has {', '.join(map(str, raw.columns))})")
    table = pd.DataFrame(index=raw.index)
    for name in ALIASES:
        found = _find(raw, name, chosen)
        if found is not None:
            column = raw[found]
            table[name] = column.astype(str) if name in TEXT else _numbers(column, source)
    if "loss" not in table:
        raise ValueError(
            f"{source}: no column for loss (it has {', '.join(map(str, raw.columns))}): name it with --loss=COLUMN"
        )
    settings = [name for name in raw.columns if str(name).startswith("config.")]
    return pd.concat([table, raw[settings]], axis=1)


def _numbers(column: pd.Series, source: str) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce").astype(np.float64)
    bad = column.index[numbers.isna() & column.notna() & (column.astype(str).str.lower() != "nan")]
    if len(bad):
        where = f"column {column.name!r} row {bad[0]}"
        raise ValueError(f"{source}: {where} is {column[bad[0]]!r}, not a number: repair it")
    return numbers


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


def _complete(table: pd.DataFrame, convention: str, notes: list[str], source: str) -> str:
    """Derive the one missing of N, D, C from the other two by C = 6ND."""
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
        return "6nd"
    if absent == ["tokens"]:
        table["tokens"] = table["flops"] / (FLOPS_PER_PARAM_TOKEN * table["params"])
    if absent == ["params"]:
        table["params"] = table["flops"] / (FLOPS_PER_PARAM_TOKEN * table["tokens"])
    return convention


def _curves(records: list[RunRecord], loss: str, table: pd.DataFrame) -> pd.DataFrame:
    """Every logged loss of the runs kept, with FLOPs counted as in the table."""
    columns = ["run", "step", "tokens", "flops", "loss"]
    flops = dict(zip(table["run"], table["flops"], strict=True)) if "run" in table else {}
    series = []
    for record in records:
        if record.name in flops:
            curve = record.series(loss).assign(run=record.name)
            counted = record.final("flops")
            curve["flops"] *= flops[record.name] / counted if counted > 0 else 1.0
            series.append(curve)
    return pd.concat(series, ignore_index=True)[columns] if series else pd.DataFrame(columns=columns)
