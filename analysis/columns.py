"""The canonical columns of a table of runs, found under the names and in the units that published tables use.

`Model Size`, `model_size`, `modelSize (M)` and `params/total` are all read; sizes may be written 125M or 1.4B.
"""

import re

import numpy as np
import pandas as pd

# Canonical column -> the names it goes by, most telling first, as `plain` writes them.
ALIASES = {
    "run": ("run", "run id", "run name", "name", "id"),
    "stage": ("stage", "correction stage", "correction"),
    "step": (
        "step", "global step", "train step", "training step", "current step", "current steps", "optimizer step",
        "trainer global step", "checkpoint step", "iteration", "iter", "update",
    ),
    # How long a run was, or where in it a row was logged: which, only the table as a whole says.
    "steps": (
        "steps", "global steps", "train steps", "training steps", "num steps", "n steps", "iterations", "iters",
        "num updates", "updates",
    ),
    "params": (
        "params", "n params", "num params", "parameters", "n parameters", "num parameters", "model params",
        "model parameters", "parameter count", "param count", "params count", "number of parameters", "model size",
        "trainable params", "trainable parameters", "nparams", "param", "size", "n",
    ),
    "params_total": ("params total", "total params", "total parameters", "n total"),
    "params_non_embedding": (
        "params non embedding", "non embedding params", "non embedding parameters", "params no embed",
        "non embed params", "params non embed", "n non embedding", "n non embed", "params non emb", "non emb params",
        "nonembedding params", "params without embedding", "params without embeddings", "n ne",
    ),
    "params_matmul": ("params matmul", "matmul params"),
    "params_active": (
        "params active", "active params", "active parameters", "activated params", "activated parameters", "n active",
        "params active precise",
    ),
    "tokens": (
        "tokens", "n tokens", "num tokens", "training tokens", "train tokens", "n train tokens", "num train tokens",
        "number of tokens", "total tokens", "tokens seen", "tokens trained", "tokens processed", "consumed tokens",
        "consumed train tokens", "throughput total tokens", "token count", "ntokens", "dataset tokens", "dataset size",
        "training dataset size datapoints", "data size", "d",
    ),
    "unique_tokens": (
        "unique tokens", "n unique tokens", "num unique tokens", "unique train tokens", "tokens unique", "unique data",
        "d unique", "u",
    ),
    "epochs": ("epochs", "n epochs", "num epochs"),
    "flops": (
        "flops", "flop", "training flops", "training flop", "train flops", "total flops", "model flops",
        "training compute", "training compute flop", "training compute flops", "total compute", "train compute",
        "compute", "compute flop", "compute flops", "c flops", "throughput total flops", "compute budget",
        "flops budget", "flop budget", "training budget", "budget", "c",
    ),
    "flops_6nd": ("flops 6nd",),
    "flops_exact": ("flops exact",),
    "flops_convention": ("flops convention", "flop convention"),
    "batch_tokens": (
        "batch tokens", "batch size tokens", "batch size in tokens", "global batch size tokens", "bs tokens",
        "tokens per batch", "tokens per step",
    ),
    "batch_sequences": ("batch size", "global batch size", "global bs", "train batch size", "batch", "bs"),
    "sequence_length": ("sequence length", "seq len", "seq length", "context length", "max seq len", "n ctx"),
    "learning_rate": ("learning rate", "lr", "peak lr", "max lr", "peak learning rate", "max learning rate"),
    "schedule": ("schedule", "lr schedule", "decay"),
    "seed": ("seed", "random seed"),
    "loss": (
        "loss", "val loss", "validation loss", "final loss", "final val loss", "final validation loss", "eval loss",
        "test loss", "loss val", "loss validation", "final eval loss", "final test loss", "smooth loss",
        "smoothed loss", "cross entropy", "cross entropy loss", "ce loss", "lm loss", "val nll", "nll", "val bpb",
        "bpb", "bits per byte", "bits per token", "train loss", "training loss", "final train loss", "l", "perplexity",
        "val perplexity", "val ppl", "ppl",
    ),
    "loss_kind": ("loss kind", "split"),
    "loss_digest": ("loss digest",),
    "loss_stderr": ("loss stderr", "val loss stderr"),
    "error": ("error", "top 1 error", "downstream error", "average error", "avg error", "err avg", "err"),
    "trunk": ("trunk", "trunk run"),
    "status": ("status", "state"),
}  # fmt: skip
TEXT = frozenset({"run", "stage", "flops_convention", "schedule", "loss_kind", "loss_digest", "trunk", "status"})
# What is only of use as a number: a column of this name that holds text is about something else.
ASIDE = frozenset({"step", "steps", "epochs", "batch_sequences", "sequence_length"})
# Columns that tables give in thousands, millions, ...; the unit ends the name, or stands as a letter at the number.
SIZES = frozenset(
    name for name in ALIASES if name.startswith(("params", "tokens", "flops")) and name not in TEXT
) | {"unique_tokens", "batch_tokens"}  # fmt: skip
UNITS = {
    "k": 1e3, "thousand": 1e3, "thousands": 1e3, "1e3": 1e3, "m": 1e6, "million": 1e6, "millions": 1e6, "1e6": 1e6,
    "10 6": 1e6, "b": 1e9, "bn": 1e9, "billion": 1e9, "billions": 1e9, "1e9": 1e9, "10 9": 1e9, "t": 1e12, "tn": 1e12,
    "trillion": 1e12, "trillions": 1e12, "1e12": 1e12, "10 12": 1e12,
    "pf days": 1e15 * 86400, "pflop days": 1e15 * 86400, "petaflop days": 1e15 * 86400,
}  # fmt: skip
# `total_gflops`, `exaFLOPs`; TFLOPS are left out, which most often count what a device does in a second.
FLOP_PREFIXES = {"giga": 1e9, "g": 1e9, "peta": 1e15, "p": 1e15, "exa": 1e18, "e": 1e18, "zetta": 1e21, "z": 1e21}
PREFIXED_FLOPS = re.compile(rf"\b({'|'.join(FLOP_PREFIXES)}) ?(flops?)$")
LOSS_UNITS = re.compile(r" (in )?(bits|nats)( per token)?$")
NUMBER = re.compile(r"([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)
THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?")
MOST_LISTED = 12


def plain(name) -> str:
    """A column name in lower case with single spaces: `modelSize (M)` and `model_size_m` are both `model size m`."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(name))
    return re.sub(r"[^a-z0-9]+", " ", spaced.lower()).strip()


def listed(columns) -> str:
    """Column names for a message, the first few of many."""
    names = [str(name) for name in columns]
    more = f", ... {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more


def find_column(raw: pd.DataFrame, name: str, chosen: dict[str, str]) -> str | None:
    """The column of `raw` that holds a canonical one: the `chosen` one, or the most telling alias; None without."""
    if name in chosen:
        return chosen[name] if chosen[name] in raw.columns else None
    present = {plain(column): str(column) for column in reversed(raw.columns)}
    bare = {}
    if name in SIZES:
        bare = {_split_unit(words)[0]: column for words, column in present.items()}
    if name == "loss":
        bare = {LOSS_UNITS.sub("", words): column for words, column in present.items()}
    ranked = [found[alias] for found in (present, bare) for alias in ALIASES[name] if alias in found]
    return ranked[0] if ranked else None


def canonical(raw: pd.DataFrame, chosen: dict[str, str], notes: list[str], source: str) -> pd.DataFrame:
    """The table in canonical columns, numbers as float64 and sizes in ones; settings (`config.*`) are kept as they are.

    `chosen` maps canonical names to columns. What was rescaled is added to `notes`. Raises ValueError, one line, when a
    chosen column or the loss is missing, or a value is not a number.
    """
    for name, column in chosen.items():
        if name not in ALIASES:
            raise ValueError(f"{source}: unknown column name {name!r} in --columns: choose from {', '.join(ALIASES)}")
        for part in _parts(raw, column) if name == "run" else [column]:
            if part not in raw.columns:
                raise ValueError(f"{source}: no column {part!r} for {name} (it has {listed(raw.columns)})")
    table = pd.DataFrame(index=raw.index)
    for name in ALIASES:
        if name == "run" and name in chosen:
            table[name] = _joined(raw[_parts(raw, chosen[name])])
            continue
        found = find_column(raw, name, chosen)
        if found is None or (name in ASIDE and not pd.api.types.is_numeric_dtype(raw[found])):
            continue
        if name in TEXT:
            # A run of no trunk is its own.
            absent = pd.Series(raw.index.astype(str) if name == "trunk" else "", raw.index)
            table[name] = raw[found].astype(str).where(raw[found].notna(), absent)
            continue
        table[name] = _numbers(raw[found], name in SIZES, source)
        unit = _split_unit(plain(found))[1] if name in SIZES else 1.0
        # A name may end in a letter that is no unit: sizes in ones are larger than their unit.
        if unit > 1.0 and (table[name].median() < unit or PREFIXED_FLOPS.search(plain(found))):
            table[name] *= unit
            notes.append(f"{name} was read from {found!r} in units of {unit:.3g}")
    if "loss" not in table:
        raise ValueError(f"{source}: no column for loss (it has {listed(raw.columns)}): name it with --loss=COLUMN")
    settings = [name for name in raw.columns if str(name).startswith("config.")]
    return pd.concat([table, raw[settings]], axis=1)


def _parts(raw: pd.DataFrame, column: str) -> list[str]:
    """The columns that together name a run: `size+seed` are two where no column is called that."""
    return [column] if column in raw.columns else column.split("+")


def _joined(columns: pd.DataFrame) -> pd.Series:
    return columns.astype(str).agg("/".join, axis=1)


def loss_unit(name: str) -> str:
    """What a loss column or metric counts in, by its name."""
    words = set(plain(name).split())
    if words & {"ppl", "perplexity"}:
        return "perplexity"
    if "bpb" in words or {"bits", "byte"} <= words:
        return "bits per byte"
    return "bits per token" if words & {"bits", "bpt"} else "nats per token"


def _split_unit(words: str) -> tuple[str, float]:
    """`tokens b`, `tokens in billions`, `billion tokens` -> (`tokens`, 1e9); names without a unit stay, with 1."""
    for unit, scale in UNITS.items():
        if words.endswith(f" {unit}"):
            return words.removesuffix(f" {unit}").removesuffix(" in"), scale
        if len(unit) > 2 and words.startswith(f"{unit} "):
            return words.removeprefix(f"{unit} ").removeprefix("of "), scale
    if prefixed := PREFIXED_FLOPS.search(words):
        return f"{words[: prefixed.start()]}{prefixed[2]}", FLOP_PREFIXES[prefixed[1]]
    return words, 1.0


def _numbers(column: pd.Series, sizes: bool, source: str) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce").astype(np.float64)
    texts = column.index[numbers.isna() & column.notna() & (column.astype(str).str.lower() != "nan")]
    for row in texts:
        numbers[row] = _size(str(column[row])) if sizes else np.nan
        if np.isnan(numbers[row]):
            raise ValueError(f"{source}: column {column.name!r} row {row} is {column[row]!r}, not a number: repair it")
    return numbers


def _size(text: str) -> float:
    """125M, 1.4 billion or 1,000,000; NaN for anything else."""
    text = text.strip()
    written = NUMBER.fullmatch(text.replace(",", "") if THOUSANDS.fullmatch(text) else text)
    try:
        return float(written[1]) * (UNITS[written[2].lower()] if written[2] else 1.0) if written else np.nan
    except (ValueError, KeyError):
        return np.nan
