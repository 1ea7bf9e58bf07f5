"""Write a study: figures with the CSV behind each, tables, numbers, the next run, one HTML page; and re-derive it all.

out/report.html        everything, self-contained
out/numbers.json       inputs, provenance, fits and estimates
out/estimates.csv      one row a method
out/next.json          config overrides of the run that the study recommends
out/law.json           the laws of learning rate and batch, for `hyperparameters` of a config
out/figures/*.{png,pdf,csv}
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import scipy

from analysis import figures, page
from analysis.cells import SEQUENCE, overrides
from analysis.estimates import Estimate, Options
from analysis.figures.style import RC, Drawing, NotApplicableError
from analysis.hyperparameters import HyperparameterLaw
from analysis.law import law_of
from analysis.runs import Runs, load_runs
from analysis.study import Study, make_study
from lmjax.models.shapes import nearest_shape

# Two derivations of the same number may differ by this much: the order of a sum, another CPU.
VERIFY_TOLERANCE = 1e-6
QUANTITIES = ("params_exponent", "tokens_exponent", "params", "tokens", "loss", "learning_rate", "batch_tokens")


@dataclass(frozen=True)
class Inputs:
    """All that determines a report; stored in it, so that it can be derived again."""

    source: str
    options: Options
    selection: dict = field(default_factory=dict)  # keyword arguments of load_runs

    def load(self) -> Runs:
        return load_runs(self.source, **self.selection)


def write_report(inputs: Inputs, out: Path, tell: Callable[[str], None] = lambda text: None) -> Study:
    """Derive and write everything, and `tell` what is being done, as it takes a while.

    Raises ValueError for tables that cannot be fitted.
    """
    check_out(out)
    started = time.monotonic()
    trials = inputs.load()
    tell(f"{len(trials.table)} runs: fitting from 4500 starts, {inputs.options.replicates} resamples a method ...")
    try:
        study = make_study(trials, inputs.options)
    except ValueError:
        tell("\n")  # the reason stands on a line of its own
        raise
    fitted = time.monotonic()
    tell(f" {fitted - started:.0f} s\nfigures:")
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = numbers_of(study, inputs)  # first: by it the directory is known to be a report's
    (out / "numbers.json").write_text(json.dumps(numbers, indent=1, default=_plain) + "\n")

    def keep(name: str, drawing: Drawing) -> None:
        save(drawing, folder / name, study.trials)
        tell(f" {name}")

    drawings, skipped = draw(study, keep)
    tell(f", {time.monotonic() - fitted:.0f} s\n")
    estimates_table(study).to_csv(out / "estimates.csv", index=False)
    next_run = recommended_run(study)
    (out / "next.json").write_text(json.dumps([next_run], indent=1) + "\n")
    (out / "law.json").write_text(json.dumps(law_of(study), indent=1, default=_plain) + "\n")
    (out / "report.html").write_text(page.render(study, numbers, drawings, skipped, folder, next_run))
    return study


def check_out(out: Path) -> None:
    """Raises ValueError where a file that a report writes is there and no report has written it."""
    names = ["numbers.json", "report.html", "estimates.csv", "next.json", "law.json"]
    names += [f"figures/{name}{suffix}" for name in figures.FIGURES for suffix in (".png", ".pdf", ".csv")]
    there = [name for name in names if (out / name).exists()]
    if there and not _is_report(out / "numbers.json"):
        raise ValueError(f"{out / there[0]} is there and no report has written it: choose another --out")


def _is_report(path: Path) -> bool:
    try:
        return {"inputs", "provenance"} <= json.loads(path.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def draw(
    study: Study, keep: Callable[[str, Drawing], None] = lambda name, drawing: None
) -> tuple[dict[str, Drawing], dict[str, str]]:
    """Every figure that the study supports, each given to `keep` when it is drawn, and why the others are missing."""
    drawings, skipped = {}, {}
    for name in figures.FIGURES:
        try:
            drawings[name] = draw_one(name, study)
        except NotApplicableError as reason:
            skipped[name] = str(reason)
        else:
            keep(name, drawings[name])
    return drawings, skipped


def draw_one(name: str, study: Study) -> Drawing:
    """One figure of FIGURES. Raises NotApplicableError when the study lacks what it shows."""
    with mpl.rc_context(RC):
        return figures.FIGURES[name](study)


def save(drawing: Drawing, stem: Path, runs: Runs) -> None:
    """PNG, PDF and CSV; the figure says which data and conventions it shows."""
    drawing.data.to_csv(stem.with_suffix(".csv"), index=False)
    excluded = sum(len(exclusion.runs) for exclusion in runs.exclusions)
    stamp = (
        f"data {runs.sha256[:12]} | {len(runs.table)} runs, {excluded} excluded | {runs.loss_name} | "
        f"N {runs.params_convention} | C {runs.flops_convention}"
    )
    with mpl.rc_context(RC):
        drawing.figure.supxlabel(stamp, fontsize=5.5, color="grey", x=0.99, ha="right")
        drawing.figure.savefig(stem.with_suffix(".png"))
        drawing.figure.set_layout_engine("none")  # half of the time went into finding the same layout again
        drawing.figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})


def recommended_run(study: Study) -> dict[str, object]:
    """Config overrides of a run at N*(target), D*(target) by approach 3, rounded to a shape that fills TPU tiles.

    Learning rate and batch follow the laws of the runs where they tried several, else published ones. Rows are as long
    as theirs, where they tell.
    """
    params, tokens = study.huber.surface.optimum(study.options.target)
    shape = nearest_shape(float(params))
    settings = {name: float(law(params, tokens)) for name, law in study.settings.items()}
    # The rounded size keeps the budget, not the token count.
    return overrides(
        shape,
        float(params * tokens) / shape.params,
        learning_rate=settings.get("learning_rate"),
        batch_tokens=settings.get("batch_tokens"),
        sequence=study.runs.sequence_length or SEQUENCE,
    )


def estimates_table(study: Study) -> pd.DataFrame:
    return pd.DataFrame([_row(estimate) for estimate in study.estimates])


def _row(estimate: Estimate) -> dict:
    row: dict[str, object] = {"method": estimate.method}
    for name in QUANTITIES:
        quantity = getattr(estimate, name)
        interval = quantity.interval if quantity else None
        row[name] = quantity.value if quantity else np.nan
        row[f"{name}_low"], row[f"{name}_high"] = (interval.low, interval.high) if interval else (np.nan, np.nan)
        row[f"{name}_interval"] = interval.method if interval else ""
    return row


def numbers_of(study: Study, inputs: Inputs) -> dict:
    runs, huber = study.runs, study.huber
    return {
        "inputs": asdict(inputs),
        "provenance": {
            "data_sha256": runs.sha256,
            "runs": len(study.trials.table),
            "runs_fitted": len(runs.table),
            "loss": runs.loss_name,
            "loss_unit": runs.loss_unit,
            "params_convention": runs.params_convention,
            "flops_convention": runs.flops_convention,
            "exclusions": [asdict(exclusion) for exclusion in runs.exclusions],
            "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        },
        "fits": {
            "huber": {**asdict(huber.surface), "objective": huber.objective, "delta": huber.delta},
            "least_absolute_deviations": {**asdict(study.absolute.surface), "objective": study.absolute.objective},
            "variable_projection": {**asdict(study.projection.surface), "residual_sd": study.projection.residual_sd},
            "kaplan": asdict(study.kaplan),
            "overtraining": asdict(study.overtraining),
            **{name: _law(law) for name, law in study.settings.items()},
            "settings_laws": {name: [_law(law) for law in laws] for name, laws in study.settings_laws.items()},
        },
        "optimizer": {
            "starts": huber.starts,
            "converged": huber.converged,
            "agreeing": huber.agreeing,
            "condition": huber.condition,
        },
        "bootstrap": study.bootstrap,
        "estimates": estimates_table(study).to_dict("records"),
        "stages": {name: [_row(e) for e in estimates] for name, estimates in study.stages.items()},
        "hold_outs": [
            {"cut": h.cut, "mean_error": h.mean_error, "max_error": h.max_error, "params_exponent": h.params_exponent}
            for h in study.hold_outs
        ],
        "absent": study.absent,
        "warnings": [*study.warnings, *study.budget_flags],
        "disagreement": study.disagreement,
    }


def _law(law: HyperparameterLaw) -> dict:
    used = sum(not cell.flag for cell in law.cells)
    names = ("log_coefficient", "params_exponent", "tokens_exponent", "residual_sd")
    form = {"regressors": law.regressors, "pooled": law.pooled, "tolerance": law.tolerance}
    return {**form, **{name: getattr(law, name) for name in names}, "cells": len(law.cells), "cells_used": used}


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a number or text")


def verify(out: Path) -> int:
    """Derive the report in `out` again from its source; return how many numbers were compared.

    Raises ValueError naming the first number that differs by more than a relative 1e-6.
    """
    path = out / "numbers.json"
    if not path.is_file():
        raise ValueError(f"{out}: no numbers.json: name a directory that `report` wrote")
    stored = _read(path)
    given = stored["inputs"]
    budgets = given["options"]["budgets"]
    options = Options(**{**given["options"], "budgets": tuple(budgets) if budgets else None})
    inputs = Inputs(given["source"], options, given["selection"])
    runs = inputs.load()
    if runs.sha256 != stored["provenance"]["data_sha256"]:
        raise ValueError(
            f"{given['source']}: the data have changed since the report ({runs.sha256[:12]}, then "
            f"{stored['provenance']['data_sha256'][:12]}): write the report again"
        )
    study = make_study(runs, options)
    fresh = json.loads(json.dumps(numbers_of(study, inputs), default=_plain))
    skip = ("versions",)  # another version may give the same numbers; that it does is what is verified
    pairs = list(_pairs(stored, fresh, "numbers.json", skip))
    pairs += _table_pairs(pd.read_csv(out / "estimates.csv"), estimates_table(study), "estimates.csv")
    if (out / "law.json").exists():  # reports of an earlier version have none
        law = json.loads(json.dumps(law_of(study), default=_plain))
        pairs += _pairs(_read(out / "law.json"), law, "law.json", ())
    for name, drawing in draw(study)[0].items():
        table = pd.read_csv(out / "figures" / f"{name}.csv")
        pairs += _table_pairs(table, drawing.data, f"figures/{name}.csv")
    for where, old, new in pairs:
        if not _same(old, new):
            raise ValueError(f"{out}: {where} is {old!r} in the report and {new!r} derived anew: write it again")
    return len(pairs)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error.msg} at line {error.lineno}): write the report again"
        ) from None


def _pairs(old, new, where: str, skip: tuple[str, ...]):
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            if key not in skip:
                yield from _pairs(old.get(key), new.get(key), f"{where}: {key}", skip)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _pairs(one, other, f"{where}[{index}]", skip)
    else:
        yield where, old, new


def _table_pairs(old: pd.DataFrame, new: pd.DataFrame, where: str) -> list[tuple[str, object, object]]:
    if list(old.columns) != list(new.columns) or len(old) != len(new):
        return [(f"{where}: shape", (len(old), list(old.columns)), (len(new), list(new.columns)))]
    return [
        (f"{where}: {column} row {row}", one, other)
        for column in old.columns
        for row, (one, other) in enumerate(zip(old[column].tolist(), new[column].tolist(), strict=True))
    ]


def _same(old, new) -> bool:
    if isinstance(old, int | float) and isinstance(new, int | float):
        both_nan = old != old and new != new
        return both_nan or old == new or abs(old - new) <= VERIFY_TOLERANCE * max(abs(old), abs(new))
    missing = (None, "", "nan")  # an empty cell of a CSV
    return old == new or (_absent(old, missing) and _absent(new, missing))


def _absent(value, missing) -> bool:
    return value in missing or value != value
