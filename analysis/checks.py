"""What is refused, excluded or noted in a table of runs before anything is fitted to it."""

import numpy as np
import pandas as pd

from analysis.records import UNDECAYED
from analysis.surface import FLOPS_PER_PARAM_TOKEN

LABEL_TOLERANCE = 0.05
ENDED = ("finished", "done", "complete", "completed", "success", "succeeded", "ok", "")
# Below these no run is worth a law: the column counts in thousands, millions or billions.
FEWEST_PARAMS, FEWEST_TOKENS = 1e4, 1e6
# Conventions of counting FLOPs differ by less than this factor; units of N, D or C by more.
LARGEST_FACTOR, LARGEST_RATIO = 30.0, 1e5


def check_one_convention(table: pd.DataFrame, source: str) -> None:
    for name, what in (("flops_convention", "FLOP conventions"), ("loss_kind", "losses")):
        if name in table and table[name].nunique() > 1:
            counts = ", ".join(f"{value} ({count} rows)" for value, count in table[name].value_counts().items())
            raise ValueError(f"{source}: mixed {what}: {counts}: keep one with --where=COLUMN=VALUE")


def exclude_unfinished(table: pd.DataFrame) -> list[tuple[str, list]]:
    if "status" not in table:
        return []
    return [
        (status if status == UNDECAYED else f"not finished (status {status})", list(rows.index))
        for status, rows in table.groupby("status")
        if status.lower() not in ENDED
    ]


def invalid_rows(table: pd.DataFrame, exclude: bool, source: str) -> list[tuple[str, list]]:
    """Rows that no fit can use. Raises unless they are to be excluded."""
    found = []
    for name in ("params", "tokens", "flops", "loss"):
        if name not in table or table[name].isna().all():
            continue
        values = table[name]
        problems = {"missing or NaN": values.isna(), "infinite": np.isinf(values), "zero or negative": values <= 0}
        for problem, mask in problems.items():
            rows = list(table.index[mask])
            if not rows:
                continue
            if not exclude:
                overflow = " (int64 overflow of 6ND wraps to negative)" if name == "flops" and values.min() < 0 else ""
                raise ValueError(
                    f"{source}: {name} is {problem} in {len(rows)} of {len(table)} rows, first in row {rows[0]}"
                    f"{overflow}: repair them, or drop them with --exclude-invalid"
                )
            found.append((f"{name} {problem}", rows))
    return found


def check_units(table: pd.DataFrame, source: str) -> None:
    """Refuse sizes that cannot be in ones."""
    for name, fewest in (("params", FEWEST_PARAMS), ("tokens", FEWEST_TOKENS)):
        if table[name].max() < fewest:
            raise ValueError(
                f"{source}: {name} is {table[name].max():.4g} at most: give it in ones, or put its unit into the name "
                f"of the column ({name}_m for millions, {name}_b for billions)"
            )
    ratio = float((table["tokens"] / table["params"]).median())
    if not 1.0 / LARGEST_RATIO < ratio < LARGEST_RATIO:
        raise ValueError(
            f"{source}: tokens / params is {ratio:.3g}, no usual ratio: check the units of both (params_m and tokens_b "
            "are understood)"
        )
    factor = float((FLOPS_PER_PARAM_TOKEN * table["params"] * table["tokens"] / table["flops"]).median())
    if not 1.0 / LARGEST_FACTOR < factor < LARGEST_FACTOR:
        raise ValueError(
            f"{source}: 6 x params x tokens / flops is {factor:.3g}, no way of counting FLOPs: check the units of the "
            "three columns (params_m, tokens_b and flops_pf_days are understood)"
        )


def note_copies(table: pd.DataFrame, notes: list[str]) -> None:
    """Rows that repeat another's N, D and loss to the last digit are no runs of their own."""
    copies = int(table.duplicated(["params", "tokens", "loss"]).sum())
    if copies:
        notes.append(f"{copies} rows repeat another's N, D and loss exactly: intervals take them for runs of their own")


def note_validation_sets(table: pd.DataFrame, notes: list[str]) -> None:
    """Losses of different texts do not compare, however alike the sets are named."""
    told = sorted({digest for digest in table.get("loss_digest", ()) if digest})
    if len(told) > 1:
        notes.append(
            f"the losses are of {len(told)} different validation sets, by their digests: they do not compare; keep one "
            f"with --where=loss_digest={told[0]}"
        )


def check_labels(table: pd.DataFrame, notes: list[str], source: str) -> None:
    """Compare the FLOP labels with 6ND: note a factor, refuse a mixture of two."""
    if table.empty:
        return
    factors = np.sort((FLOPS_PER_PARAM_TOKEN * table["params"] * table["tokens"] / table["flops"]).to_numpy())
    jumps = np.diff(np.log(factors))
    # Attention and embeddings make 6ND / C drift smoothly with size; a gap of 1.8x splits two ways of counting.
    if len(jumps) and jumps.max() > np.log(1.8):
        cut = int(jumps.argmax()) + 1
        low, high = factors[:cut], factors[cut:]
        if min(len(low), len(high)) >= 0.1 * len(factors):
            raise ValueError(
                f"{source}: mixed FLOP conventions: 6ND / flops is about {np.median(low):.3g} in {len(low)} rows and "
                f"{np.median(high):.3g} in {len(high)}: keep one convention, or drop the column to derive 6ND"
            )
    median = float(np.median(factors))
    if max(abs(np.log(factors[0])), abs(np.log(factors[-1]))) > LABEL_TOLERANCE:
        forward = " (labels of the forward pass alone give 3)" if abs(median / 3.0 - 1.0) < LABEL_TOLERANCE else ""
        notes.append(f"6ND / flops is {median:.3g} (from {factors[0]:.3g} to {factors[-1]:.3g}){forward}")
