"""Where runs come from: work directories, offline wandb directories, a wandb project."""

from dataclasses import replace
from pathlib import Path

from analysis import wandb_runs, workdirs
from analysis.records import RunRecord, flatten


def read_records(sources: list[str], api=None, group: str | None = None) -> list[RunRecord]:
    """All runs of `sources`: work directories, folders of them, sweeps, offline wandb runs, `wandb:entity/project`; or
    those of one group, which for the cells of a sweep is its name.

    Names are made unique by a number. Raises ValueError for a source that does not exist or holds no runs.
    """
    records = [record for source in sources for record in _read(source, api, group)]
    if group is not None:
        records = [record for record in records if flatten(record.config).get("tracking.group") == group]
        if not records:
            raise ValueError(f"{', '.join(sources)}: no run is of the group {group}: leave --group out to see all")
    return _with_unique_names(records)


def _read(source: str, api, group: str | None) -> list[RunRecord]:
    if source.startswith("wandb:"):
        return wandb_runs.read_project(source.removeprefix("wandb:"), api=api, group=group)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{source}: no such file or directory: check the path")
    found = (
        workdirs.read_sweep(path)
        if workdirs.is_sweep(path)
        else [workdirs.read_workdir(folder) for folder in workdirs.find_workdirs(path)]
    )
    found = found or wandb_runs.read_offline(wandb_runs.find_offline(path))
    if not found:
        raise ValueError(f"{source}: holds no metrics.jsonl and no .wandb file: name a directory of runs")
    return found


def _with_unique_names(records: list[RunRecord]) -> list[RunRecord]:
    seen: dict[str, int] = {}
    renamed = []
    for record in records:
        seen[record.name] = seen.get(record.name, 0) + 1
        suffix = f" ({seen[record.name]})" if seen[record.name] > 1 else ""
        renamed.append(replace(record, name=record.name + suffix))
    return renamed
