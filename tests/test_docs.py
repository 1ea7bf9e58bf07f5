"""Pages that are written from the code say what the code says, and the Slurm script does what its page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_page_of_settings_is_up_to_date() -> None:
    written = subprocess.run(
        [sys.executable, "docs/config_page.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert written == (ROOT / "docs" / "config.md").read_text(), "python docs/config_page.py > docs/config.md"


# What the script calls, as far as it matters here: `srun` returns the highest code of all processes, of which each
# ends with its own of $CODES.
PROGRAMS = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        highest=0
        for CODE in $CODES; do export CODE; "$@"; code=$?; highest=$((code > highest ? code : highest)); done
        exit $highest""",
    "lmjax": "exit $CODE",
    "scontrol": 'echo "$@"',
}


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "requeued"),
    [
        ("0 0", 0, 0, False),
        ("6 2 6", 0, 202, False),  # who loses another process is not the cause
        ("137 1", 0, 201, False),
        ("6 3", 0, 203, False),
        ("5 5", 0, 205, False),
        ("4 6", 0, 6, True),
        ("4", 0, 4, True),
        ("75 75", 99, 75, True),
        ("75 75", 100, 75, False),
        ("6 137", 0, 137, True),
    ],
)
def test_slurm_starts_again_what_another_start_may_mend(
    tmp_path: Path, codes: str, restarts: int, code: int, requeued: bool
) -> None:
    script = re.search(r"```sh\n(#!/bin/bash.*?)```", (ROOT / "docs" / "multi-host.md").read_text(), re.DOTALL)
    assert script
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODES": codes, "SLURM_JOB_ID": "7"}
    counted = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}  # not set at the first start
    done = subprocess.run(
        ["bash", "-c", script[1]], env=variables | counted, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "requeue 7\n" if requeued else "", "")


def test_slurms_shells_leave_sigterm_to_the_processes(tmp_path: Path) -> None:
    """They pass on the code of a process that ends in its own time."""
    line = re.search(r"^each='(.*)'$", (ROOT / "docs" / "multi-host.md").read_text(), re.MULTILINE)
    assert line
    saving = "trap 'sleep 0.2; exit 75' TERM; kill -TERM $PPID; kill -TERM $$; sleep 10"
    done = subprocess.run(["bash", "-c", line[1], "-", "bash", "-c", saving], timeout=30)
    assert done.returncode == 75
