"""One finished run as its parts: configuration, summary, and history rows. Workdirs and wandb are read into this.

The keys are those of `metrics.jsonl` and `summary.json` of a training work directory: `step`, `tokens`, `flops`,
`train/loss`, `val/<set>/loss` (maybe of a part of the set, the same at every step), `val_full/<set>/loss` (at the
end, of the whole set), `optim/lr`, `params/total`, ...
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

UNDECAYED = "the trunk of branches, not decayed"


@dataclass(frozen=True)
class RunRecord:
    name: str
    config: dict = field(default_factory=dict)  # nested, as resolved
    summary: dict = field(default_factory=dict)
    history: tuple[dict, ...] = ()  # one dict a logged step, rising in `step`
    workdir: str = ""  # where it lies, if it does

    @property
    def trunk(self) -> str:
        """The run whose first steps are its own, too; itself for a run that branches from none."""
        origin = flatten(self.config).get("train.branch_from")
        return str(Path(origin.rpartition("@")[0]).resolve()) if origin else self.workdir or self.name

    @property
    def decays(self) -> bool:
        """Whether its learning rate is lower at the end than at its peak."""
        rates = [row["optim/lr"] for row in self.history if "optim/lr" in row]
        return bool(rates) and rates[-1] < 0.99 * max(rates)

    def series(self, metric: str) -> pd.DataFrame:
        """Columns step, tokens, flops, loss of the rows that log `metric`."""
        rows = [row for row in self.history if isinstance(row.get(metric), int | float)]
        return pd.DataFrame(
            {
                "step": [float(row["step"]) for row in rows],
                "tokens": [float(row.get("tokens", np.nan)) for row in rows],
                "flops": [float(row.get("flops", np.nan)) for row in rows],
                "loss": [float(row[metric]) for row in rows],
            }
        )

    def final(self, key: str) -> float:
        """The summary's value, or else the last one logged; NaN without either, or where it is null or "NaN".

        Of a validation score that of the whole set goes first, where it was taken: what is logged along the way
        (`val/`) may be of a part of the set.
        """
        whole = re.sub("^val/", "val_full/", key)
        rows = [self.summary, *reversed(self.history)]
        values = (row[name] for name in dict.fromkeys([whole, key]) for row in rows if name in row)
        value = next(values, None)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else np.nan

    def digest(self, loss: str) -> str:
        """Of the validation set that a loss is of, or of all sets for their macro average; empty where none is told."""
        named = re.match("val/([^/]+)/", loss)
        if named is None:
            return ""
        which = "[^/]+" if named[1] == "macro" else re.escape(named[1])
        rows = (*self.history, self.summary)
        told = {key: row[key] for row in rows for key in row if re.fullmatch(f"data/{which}/valid_digest", key)}
        return " ".join(str(told[key]) for key in sorted(told))


def merge_history(rows) -> tuple[dict, ...]:
    """Rows by rising step; of rows that repeat a step after a restart, later values win key by key."""
    by_step: dict[float, dict] = {}
    for row in rows:
        by_step.setdefault(row["step"], {}).update(row)
    return tuple(by_step[step] for step in sorted(by_step))


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def choose_loss(records: list[RunRecord], loss: str | None) -> str:
    """The metric to analyse: `loss`, or `val/macro/loss`, or the only `val/<set>/loss`, or `train/loss` if none.

    Raises ValueError when several validation sets are logged and none was named.
    """
    if loss is not None:
        return loss
    logged = {key for record in records for row in record.history for key in row}
    validation = sorted(key for key in logged if key.startswith("val/") and key.endswith("/loss"))
    if "val/macro/loss" in validation:
        return "val/macro/loss"
    if len(validation) > 1:
        raise ValueError(f"runs log several validation losses ({', '.join(validation)}): choose one with --loss=NAME")
    return validation[0] if validation else "train/loss"


def table_of(records: list[RunRecord], loss: str) -> pd.DataFrame:
    """One row a run in the canonical columns of `analysis.runs`, plus every scalar of its config as `config.*`.

    A trunk at a constant learning rate is no run of its own: its loss is above that of a run that ends where it does.
    """
    trunks = {record.trunk for record in records if record.trunk not in (record.workdir, record.name)}
    undecayed = [record for record in records if record.workdir in trunks and not record.decays]
    return pd.DataFrame(
        [{**_row(record, loss), **({"status": UNDECAYED} if record in undecayed else {})} for record in records]
    )


def _row(record: RunRecord, loss: str) -> dict:
    flat = flatten(record.config)
    learning_rates = [row["optim/lr"] for row in record.history if "optim/lr" in row]
    schedules = [v for k, v in flat.items() if k.endswith(("schedule", "schedule.name")) and isinstance(v, str)]
    return {
        "run": record.name,
        "params_total": record.final("params/total"),
        "params_non_embedding": record.final("params/non_embedding"),
        "params_matmul": record.final("params/matmul"),
        "params_active": _first_number(record.final("params/active"), record.final("params/total")),
        "tokens": record.final("tokens"),
        "unique_tokens": _first_number(record.final("data/unique_tokens"), _tokens_an_epoch(record)),
        "flops_6nd": record.final("flops_6nd"),
        # A run that died has no summary, but its rows count FLOPs in the same way.
        "flops_exact": _first_number(*(record.final(key) for key in ("flops_exact", "flops_causal", "flops"))),
        "learning_rate": max(learning_rates, default=np.nan),
        "batch_tokens": _batch_tokens(record),
        "schedule": schedules[0] if schedules else "",
        "seed": record.final("seed"),
        "loss": record.final(loss),
        "loss_kind": loss,
        "loss_digest": record.digest(loss),
        "loss_stderr": record.final(f"{loss}_stderr"),
        "trunk": record.trunk,
        "status": record.summary.get("status", "unfinished"),
        **{f"config.{key}": value for key, value in flat.items() if isinstance(value, str | int | float | bool)},
    }


def _batch_tokens(record: RunRecord) -> float:
    """Tokens per step between the last two logged steps (after any batch ramp)."""
    rows = [row for row in record.history if "tokens" in row]
    if len(rows) < 2:
        return np.nan
    return (rows[-1]["tokens"] - rows[-2]["tokens"]) / (rows[-1]["step"] - rows[-2]["step"])


def _tokens_an_epoch(record: RunRecord) -> float:
    """Unique tokens of a run on one source, from the epochs it made of it; NaN for mixtures."""
    epochs = [value for key, value in record.summary.items() if key.startswith("epochs/")]
    return record.final("tokens") / epochs[0] if len(epochs) == 1 and epochs[0] > 0 else np.nan


def _first_number(*values: float) -> float:
    return next((value for value in values if not np.isnan(value)), np.nan)
