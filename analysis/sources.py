"""Where runs come from: work directories, offline wandb directories, a wandb project."""

from pathlib import Path

from analysis import wandb_runs, workdirs
from analysis.records import RunRecord


def read_records(sources: list[str], api=None) -> list[RunRecord]:
    """All runs of `sources`: work directories, folders of them or of offline wandb runs, `wandb:entity/project`.

    Names are made unique by a number. Raises ValueError for a source that does not exist or holds no runs.
    """
    return _with_unique_names([record for source in sources for record in _read(source, api)])


def _read(source: str, api) -> list[RunRecord]:
    if source.startswith("wandb:"):
        return wandb_runs.read_project(source.removeprefix("wandb:"), api=api)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{source}: no such file or directory: check the path")
    found = [workdirs.read_workdir(folder) for folder in workdirs.find_workdirs(path)]
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
        renamed.append(RunRecord(record.name + suffix, record.config, record.summary, record.history))
    return renamed
