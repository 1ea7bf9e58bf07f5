"""Read the work directories of training runs: `config.json`, `metrics.jsonl`, `summary.json`; and sweeps of them."""

import json
from dataclasses import replace
from pathlib import Path

from analysis.records import RunRecord


def is_workdir(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file()


def find_workdirs(root: Path) -> list[Path]:
    """`root` itself, or the work directories below it, sorted by path."""
    if is_workdir(root):
        return [root]
    return sorted(path.parent for path in root.rglob("metrics.jsonl"))


def is_sweep(path: Path) -> bool:
    """Whether `python -m launch sweep` wrote it."""
    return (path / "sweep.json").is_file()


def read_sweep(path: Path) -> list[RunRecord]:
    """The cells of a sweep by the names that it gave them; those that have not started are runs without a row."""
    records = []
    for entry in _read_object(path / "sweep.json").get("cells", []):
        name = f"{entry['index']} {entry['name']}".strip()
        workdir = path / "cells" / f"{entry['index']:04d}"
        records.append(replace(read_workdir(workdir), name=name) if is_workdir(workdir) else RunRecord(name))
    return records


def read_workdir(path: Path) -> RunRecord:
    """One run. Raises ValueError naming file and line when a line other than the torn last one is not a JSON object."""
    rows: dict[float, dict] = {}
    ended: dict = {}
    for line in _read_lines(path / "metrics.jsonl"):
        event = line.get("event")
        if event == "start":
            # An attempt counts from the step it starts at; what earlier ones logged beyond it does not.
            rows = {step: row for step, row in rows.items() if step <= line.get("step", step)}
        elif event is not None:
            ended.update(line)
        elif "step" in line:
            rows.setdefault(line["step"], {}).update(line)
    return RunRecord(
        name=path.name,
        config=_unstamped(path / "config.json"),
        summary={**ended, **_unstamped(path / "summary.json")},
        history=tuple(rows[step] for step in sorted(rows)),
        workdir=str(path.resolve()),
    )


def _read_object(path: Path) -> dict:
    """The JSON object in `path`; empty when the file is absent, as in a run that has not ended."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error.msg} at line {error.lineno}): restore or delete it") from None


def _unstamped(path: Path) -> dict:
    """`_read_object` without what it says of the lmjax that wrote it."""
    content = _read_object(path)
    content.pop("lmjax", None)
    return content


def _read_lines(path: Path) -> list[dict]:
    lines = path.read_text(errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            # A killed run leaves its last line torn; anything before that is damage.
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a JSON object: repair or delete the line")
        rows.append(row)
    return rows
