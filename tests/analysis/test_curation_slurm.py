"""A comparison with a cluster ends, whatever becomes of the cluster's jobs."""

import subprocess
from pathlib import Path

import pytest

from analysis.bench import curation_slurm


def test_jobs_that_never_end_are_not_awaited_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **named: None)
    monkeypatch.setattr(curation_slurm, "LONGEST_SECONDS", 0.0)
    monkeypatch.setattr(curation_slurm.time, "sleep", lambda seconds: None)
    done = tmp_path / "theirs/logs/keep/completions/00000"
    done.parent.mkdir(parents=True)
    done.touch()
    with pytest.raises(SystemExit, match="after 0 s 1 of 4 tasks of the last job, theirs-keep, are done; see squeue"):
        curation_slurm.on_cluster(tmp_path, "debug")
