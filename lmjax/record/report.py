"""The report of a run, written from what lies in its work directory alone: report.md and loss.png.

It reads config.json, metrics.jsonl, summary.json (a finished run has one), samples/ and checkpoints/, so that a report
can be made again at any time, also of a run that died.
"""

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lmjax.errors import visible
from lmjax.process.faults import fault
from lmjax.record import files, seal
from lmjax.record.history import Attempt, Record, Row, read_record
from lmjax.record.loss_plot import plot_loss, smooth

MFU_CONVENTION = (
    "MFU counts the matmuls and causal attention of forward and backward pass (recomputation is not counted) against "
    "the dense bf16 peak of the devices."
)


_MAX_ROWS = 25


def write_report(workdir: epath.PathLike, *, defaults: Mapping[str, Any] | None = None) -> None:
    """Write report.md and loss.png into `workdir`. `defaults` is a config to list the differences from."""
    record = read_record(workdir)
    sections = [
        _headline(record),
        _reproduce(record, defaults),
        _results(record),
        "![loss](loss.png)",
        _size(record),
        _speed(record),
        _time(record),
        _attempts(record),
        _checkpoints(record),
        _sample(record),
    ]
    fault("report.write")
    files.write_atomically(record.workdir / "loss.png", plot_loss(record))
    fault("report.between")
    files.write_atomically(record.workdir / "report.md", "\n\n".join(filter(None, sections)) + "\n")


def _headline(record: Record) -> str:
    steps = record.config["train"]["steps"]
    status = record.attempts[-1].status if record.attempts else "not started"
    return f"# {record.workdir.name}\n\n{status.capitalize()} at step {record.step:,} of {steps:,}."


def _reproduce(record: Record, defaults: Mapping[str, Any] | None) -> str:
    if not record.attempts:
        return ""
    start = record.attempts[-1].start
    facts = start.get("environment", {})
    text = f"## Reproduce\n\n```\n{start.get('command', '')}\n```\n\n"
    text += _table(["", ""], [[name.replace("_", " "), value] for name, value in facts.items()])
    if defaults is not None:
        before, after = _flat(json.loads(json.dumps(defaults))), _flat(record.config)  # both with lists for tuples
        changed = [
            [f"`{k}`", before.get(k), after.get(k)] for k in {**before, **after} if before.get(k) != after.get(k)
        ]
        text += "\n\nSettings that differ from the defaults:\n\n" + _table(["setting", "default", "here"], changed)
    return text


def _results(record: Record) -> str:
    rows = []
    for name in record.validation_sets:
        losses = record.series(f"val/{name}/loss")
        bpb = {step: value for step, _, value in record.series(f"val/{name}/bpb")}
        if not losses:
            continue
        final, best = losses[-1], min(losses, key=lambda point: point[2])
        rows += [
            [name, which, step, loss, bpb.get(step)] for which, (step, _, loss) in (("final", final), ("best", best))
        ]
        whole_bpb = {step: value for step, _, value in record.series(f"val_full/{name}/bpb")}
        for step, _, loss in record.series(f"val_full/{name}/loss")[-1:]:
            rows.append([name, "final, whole set", step, loss, whole_bpb.get(step)])
    text = "## Results\n\n"
    training = record.series("train/loss")
    if training:
        text += f"Training loss {_show(smooth([loss for *_, loss in training])[-1])} nats per token (smoothed).\n\n"
    if not rows:
        return text + "No evaluation yet."
    text += _table(["validation set", "", "step", "loss (nats per token)", "bits per byte"], rows)
    digests = {name: record.last(f"data/{name}/valid_digest") for name in record.validation_sets}
    if named := [f"{name} `{digest}`" for name, digest in digests.items() if digest]:
        text += f"\n\nNumbers compare between runs whose validation sets have the same digest: {', '.join(named)}."
    logged = {key for row in record.rows for key in row}
    scores = {k: v for k, v in record.summary.items() if k.startswith(("val/", "val_full/"))}
    only_at_the_end = [[k, v] for k, v in scores.items() if k not in logged]
    if only_at_the_end:
        text += "\n\nFor comparison"
        if any(key.endswith("xz_bpb") for key, _ in only_at_the_end):
            text += " (bits per byte by `xz -9e`; primed: after it has read the training text, of long ones 128 MiB)"
        text += ":\n\n" + _table(["", ""], only_at_the_end)
    text += "\n\n### Evaluations\n\n" + _evaluations(record, "val/")
    benchmarks = any(key.startswith("eval/") for row in record.rows for key in row)
    return text + ("\n\n### Benchmarks\n\n" + _evaluations(record, "eval/") if benchmarks else "")


def _evaluations(record: Record, family: str) -> str:
    keys = [
        key for key in dict.fromkeys(itertools.chain(*record.rows)) if key.startswith(family) and "stderr" not in key
    ]
    rows = [row for row in record.rows if any(key in row for key in keys)]
    shown = _thinned(rows)
    table = _table(
        ["step", "tokens", *(key.removeprefix(family) for key in keys)], [_cells(row, keys) for row in shown]
    )
    return table + (f"\n\n{len(shown)} of {len(rows)} evaluations." if len(shown) < len(rows) else "")


def _cells(row: Row, keys: Sequence[str]) -> list[Any]:
    return [row["step"], row["tokens"], *(row.get(key) for key in keys)]


def _size(record: Record) -> str:
    cfg = record.config
    used = record.rows[-1]["tokens"] if record.rows else 0  # whatever batch and seq_len were then
    planned = used + (cfg["train"]["steps"] - record.step) * cfg["train"]["batch"] * cfg["data"]["seq_len"]
    flops = record.rows[-1]["flops"] if record.rows else 0
    rows = [["tokens", f"{used:,}", f"{planned:,}"]]
    if used:
        rows.append(["training FLOPs (causal)", f"{flops:.4g}", f"{flops * planned / used:.4g}"])
    text = "## Size and budget\n\n"
    if record.attempts and "params" in record.attempts[-1].start:
        params = record.attempts[-1].start["params"]
        text += _table(["parameters", ""], [[name.replace("_", "-"), n] for name, n in params.items()]) + "\n\n"
    text += _table(["", "used", "planned"], rows)
    others = {key: value for key, value in record.summary.items() if key.startswith(("flops_", "epochs/"))}
    if others:
        text += "\n\n" + _table(["other accounts", ""], [[key, value] for key, value in others.items()])
    return text


def _speed(record: Record) -> str:
    def median(key: str) -> float | None:
        values = [value for *_, value in record.series(key)]
        return statistics.median(values) if values else None

    rate, mfu = median("perf/tokens_per_sec"), median("perf/mfu")
    if rate is None:
        return ""
    text = f"## Speed\n\nMedian {rate:,.0f} tokens per second, {1e3 * (median('perf/step_time') or 0):,.1f} ms per step"
    if mfu is None:
        return text + "; no peak FLOP/s is known for this device, so there is no MFU."
    return text + f", MFU {100 * mfu:.1f}%.\n\n{MFU_CONVENTION}"


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds of wall time between the first start and the last record."""

    kept: float
    """Seconds in training steps that the result comes from."""
    repeated: float
    """Seconds in training steps that a later attempt had to do again."""
    between: float
    """Seconds between the end of an attempt and the start of the next."""
    total: float

    @property
    def other(self) -> float:
        """Start-up, compilation, evaluation, samples, checkpoints."""
        return max(0.0, self.total - self.kept - self.repeated - self.between)


def time_spent(attempts: Sequence[Attempt]) -> Spent:
    kept = repeated = 0.0
    for attempt, later in zip(attempts, [*attempts[1:], None], strict=True):
        timed = [(row["step"], row["perf/step_time"]) for row in attempt.rows if "perf/step_time" in row]
        steps = [attempt.start["step"], *(step for step, _ in timed)]
        for before, (step, seconds) in zip(steps, timed, strict=False):
            lost = max(0, step - max(before, later.start["step"])) if later is not None else 0
            kept += (step - before - lost) * seconds
            repeated += lost * seconds
    between = sum(max(0.0, b.start["time"] - a.ended) for a, b in itertools.pairwise(attempts))
    return Spent(kept, repeated, between, total=attempts[-1].ended - attempts[0].start["time"])


def _time(record: Record) -> str:
    if not record.attempts:
        return ""
    spent = time_spent(record.attempts)
    if spent.total <= 0:
        return ""
    rows: list[tuple[str, float]] = [
        ("training steps", spent.kept),
        ("training steps done again after a restart", spent.repeated),
        ("between attempts", spent.between),
        ("start-up, compilation, evaluation, samples, checkpoints", spent.other),
        ("all", spent.total),
    ]
    cells = [[what, _duration(seconds), f"{100 * seconds / spent.total:.1f}%"] for what, seconds in rows]
    return f"## Time\n\nGoodput {100 * spent.kept / spent.total:.1f}%.\n\n" + _table(["", "", "share"], cells)


def _attempts(record: Record) -> str:
    rows = [
        [number, _date(attempt.start["time"]), attempt.start["step"], attempt.reached, attempt.status]
        for number, attempt in enumerate(record.attempts)
    ]
    return "## Attempts\n\n" + _table(["", "started (UTC)", "from step", "to step", "ended"], rows) if rows else ""


def _checkpoints(record: Record) -> str:
    directory = record.workdir / "checkpoints"
    if not directory.exists():
        return ""
    sealed = [path for path in directory.iterdir() if path.name.isdigit() and seal.is_sealed(path)]
    lines = [f"- `{path}`" for path in sorted(sealed, key=lambda path: int(path.name))]
    return "\n".join(["## Checkpoints", "", *lines]) if lines else ""


def _sample(record: Record) -> str:
    directory = record.workdir / "samples"
    found = [path for path in directory.glob("*.txt") if path.stem.isdecimal()] if directory.exists() else []
    samples = sorted(found, key=lambda path: int(path.stem))
    if not samples:
        return ""
    text = visible(samples[-1].read_bytes().decode(errors="replace")).replace("```", "` ` `")
    return f"## Sample at step {samples[-1].stem}\n\n```\n{text}\n```"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_show(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "\\|").replace("\n", " ")
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if 1e-3 < abs(value) < 1e5 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    nested = {f"{prefix}.{name}" if prefix else str(name): child for name, child in tree.items()}
    return {key: value for name, child in nested.items() for key, value in _flat(child, name).items()}


def _thinned(rows: Sequence[Row]) -> list[Row]:
    """Choose at most `_MAX_ROWS` of the rows, spread evenly, the first and the last among them."""
    if len(rows) <= _MAX_ROWS:
        return list(rows)
    return [rows[index] for index in np.linspace(0, len(rows) - 1, _MAX_ROWS).round().astype(int)]
