"""Read runs from wandb: online through `scan_history`, cached as parquet; offline from `*.wandb` files.

Why so: `history()` samples; `scan_history(keys)` drops rows that lack any key, so each metric family is fetched by a
call of its own; a run killed offline leaves a torn file, and a resumed one leaves two directories of one id.
"""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from analysis.records import RunRecord, merge_history

# The LevelDB log format: blocks of 32 KiB, records cut into fragments of these types, each behind 7 bytes of header.
BLOCK, HEADER = 32768, 7
FULL, FIRST, LAST = 1, 2, 4
FAMILIES = ("train/", "val/", "val_full/", "optim/", "perf/", "data/")
COUNTERS = ("_step", "tokens", "flops")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lmjax-analysis"


def read_project(project: str, *, group: str | None = None, api=None, cache: Path | None = None) -> list[RunRecord]:
    """Every run of `entity/project`, or of one group of it, all rows unsampled. `api` stands in for `wandb.Api()`.

    Raises ValueError when wandb is not installed, the project has no runs, or a history comes back incomplete.
    """
    if api is None:
        api = _connect()
    runs = list(api.runs(project, **({"filters": {"group": group}} if group else {})))
    if not runs:
        what = f"no runs of the group {group}" if group else "no runs"
        raise ValueError(f"wandb:{project} has {what}: check the names")
    folder = (cache or default_cache()) / project.replace("/", "--")
    return [
        RunRecord(run.name, _config(dict(run.config)), _flat_summary(dict(run.summary)), _history(run, folder))
        for run in runs
    ]


def _connect():
    try:
        import wandb
    except ImportError:
        raise ValueError("reading wandb: needs the wandb package: pip install wandb") from None
    return wandb.Api()


def _history(run, folder: Path) -> tuple[dict, ...]:
    rows = []
    for family in FAMILIES:
        keys = sorted(key for key in run.summary if key.startswith(family) and not key.startswith("_"))
        rows += [row for key in keys for row in _metric(run, key, folder)]
    return merge_history({("step" if k == "_step" else k): v for k, v in row.items()} for row in rows)


def _metric(run, key: str, folder: Path) -> list[dict]:
    """Rows of one metric with the counters beside it, from the cache when the run has not moved since."""
    path = folder / f"{run.id}-{run.lastHistoryStep}-{key.replace('/', '.')}.parquet"
    if path.is_file():
        return pd.read_parquet(path).to_dict("records")
    present = [name for name in COUNTERS if name == "_step" or name in run.summary]
    rows = list(run.scan_history(keys=[*present, key]))
    if run.lastHistoryStep and not rows:
        raise ValueError(
            f"wandb returned no rows of {key} for run {run.id}, which logged {run.lastHistoryStep} steps: "
            "update wandb (0.27.1 and 0.27.2 lose resumed runs) or read the work directories"
        )
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pd.DataFrame(rows).to_parquet(partial)
    partial.replace(path)
    return rows


def _config(logged: dict) -> dict:
    """A run's settings by the names of its work directory: lmjax logs them under `config`, beside what follows."""
    settings = logged.get("config")
    return {**logged, **settings} if isinstance(settings, dict) else logged


def _flat_summary(summary: dict) -> dict:
    """define_metric nests values as {"val/loss": {"min": .., "last": ..}}; keep the last one."""
    return {key: value.get("last", value) if isinstance(value, dict) else value for key, value in summary.items()}


def find_offline(root: Path) -> list[Path]:
    return sorted(root.rglob("*.wandb"))


def read_offline(paths: list[Path]) -> list[RunRecord]:
    """Runs in offline files; files of one run id are merged in order of path (which starts with the start time).

    Raises ValueError for a file that holds no run, such as one of a process killed before it wrote anything.
    """
    runs: dict[str, dict] = {}
    for path in paths:
        records = list(_records(path))
        if not any(record.WhichOneof("record_type") == "run" for record in records):
            raise ValueError(f"{path}: holds no run ({path.stat().st_size} bytes): delete it or name another file")
        for record in records:
            _absorb(record, runs)
    return [
        RunRecord(
            name=run["name"], config=_config(run["config"]), summary=run["summary"], history=merge_history(run["rows"])
        )
        for run in runs.values()
    ]


def _absorb(record, runs: dict[str, dict]) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        name = record.run.display_name or record.run.run_id
        run = runs.pop(record.run.run_id, {"name": name, "config": {}, "summary": {}, "rows": []})
        # The run at the end of the dict is the one whose file is being read.
        runs[record.run.run_id] = run
        run["config"].update({k: v for k, v in _items(record.run.config.update).items() if k != "_wandb"})
    elif kind == "history":
        row = _items(record.history.item)
        _current(runs)["rows"].append({"step": row.get("_step", record.history.step.num), **row})
    elif kind == "summary":
        _current(runs)["summary"].update(_flat_summary(_items(record.summary.update)))


def _current(runs: dict[str, dict]) -> dict:
    assert runs, "a wandb file opens with its run record"
    return next(reversed(runs.values()))


def _items(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(path: Path) -> Iterator:
    """Protocol buffers of one file, up to a torn tail. Raises ValueError for a file that is not a wandb log."""
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError:
        raise ValueError(f"{path}: reading offline wandb files needs the wandb package: pip install wandb") from None
    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path}: not a wandb log (it should start with ':W&B'): name another file")
    for payload in _payloads(data):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        yield record


def _payloads(data: bytes) -> Iterator[bytes]:
    offset = HEADER
    parts: list[bytes] = []
    while offset + HEADER <= len(data):
        left = BLOCK - offset % BLOCK
        _, length, kind = struct.unpack("<IHB", data[offset : offset + HEADER])
        if left < HEADER or (kind == 0 and length == 0):
            offset += left
            continue
        part = data[offset + HEADER : offset + HEADER + length]
        if len(part) < length:
            return
        offset += HEADER + length
        parts = [part] if kind in (FULL, FIRST) else [*parts, part]
        if kind in (FULL, LAST):
            yield b"".join(parts)
