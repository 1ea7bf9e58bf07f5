"""The script that sbatch gets, run with stand-ins for Slurm's tools; test_slurm_cluster.py has the real ones."""

import os
import subprocess
from pathlib import Path

import pytest

from launch.engines import slurm
from launch.job import Hardware
from lmjax.errors import ConfigError
from tests.launch.fake_tools import SLURM, Tools, install
from tests.launch.rendered import CASES, arguments, golden, jobs, render


def test_the_script_is_as_it_was() -> None:
    """After a wanted change: python -m tests.launch.rendered."""
    assert render(CASES["slurm"]) == golden("slurm")


def script(directory: str, hardware: Hardware = Hardware(), flags: tuple[str, ...] = ()) -> str:  # noqa: B008
    rendered = slurm.render("first", directory, jobs(directory), hardware, arguments(slurm, flags))
    return rendered["slurm.sh"]


def run(tmp_path: Path, directory: str, **variables: str) -> tuple[int, list[str]]:
    """(exit code, lines) of the script of a task of array 7."""
    text = script(directory).replace("/opt/python/bin/python", str(tmp_path / "python"))
    install(tmp_path, SLURM | {"python": 'echo "$XLA_FLAGS[$*]"; exit $CODE'})
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "7", **variables}
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(("task", "cell"), [(0, 3), (1, 7), (2, 0)])
def test_tasks_are_cells_the_dearest_first(tmp_path: Path, task: int, cell: int) -> None:
    """Whatever characters the directory's name has."""
    directory = """/shared/it's "$(echo a)" 50%"""
    code, lines = run(tmp_path, directory, CODES="0", SLURM_ARRAY_TASK_ID=str(task))
    variable = "--a=1 --b=2" if cell == 7 else ""
    assert (code, lines) == (0, [f"{variable}[-m launch cell {directory} {cell}]"])


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "requeued"),
    [
        ("0 0", 0, 0, False),
        ("6 2 6", 0, 2, False),  # who loses another host is not the cause
        ("137 1", 0, 1, False),
        ("6 3", 0, 3, False),
        ("4 6", 0, 4, False),
        ("5 5", 0, 5, False),
        ("6", 0, 6, True),
        ("75 75", 99, 75, True),
        ("75 75", 100, 75, False),
        ("6 137", 0, 137, True),
        ("6 143", 0, 143, True),  # SIGTERM came before the cell listened
        ("127", 0, 127, False),
    ],
)
def test_what_another_start_may_mend_is_started_again(
    tmp_path: Path, codes: str, restarts: int, code: int, requeued: bool
) -> None:
    counted = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}  # not set at the first start
    ended, lines = run(tmp_path, "/d", CODES=codes, SLURM_ARRAY_TASK_ID="2", **counted)
    assert (ended, lines[len(codes.split()) :]) == (code, ["requeue 7_2"] if requeued else [])


@pytest.mark.parametrize(
    ("hardware", "flags"),
    [
        (Hardware(), {"--nodes=1"}),
        (Hardware(nodes=3), {"--nodes=3"}),
        (Hardware("H100-8"), {"--nodes=1", "--gpus-per-node=8"}),
        (Hardware("H100-8", nodes=4), {"--nodes=4", "--gpus-per-node=2"}),
    ],
)
def test_hosts_and_their_gpus(hardware: Hardware, flags: set[str]) -> None:
    asked = {line.split()[1] for line in script("/d", hardware).splitlines() if line.startswith("#SBATCH")}
    assert {flag for flag in asked if flag.startswith(("--nodes", "--gpus"))} == flags
    assert {"--array=0-2", "--ntasks-per-node=1", "--requeue", "--signal=TERM@120", "--open-mode=append"} <= asked
    assert not any(flag.startswith(("--time", "--partition")) for flag in asked)  # the cluster's own hold


@pytest.mark.parametrize(
    ("directory", "hardware", "flags", "problem"),
    [
        ("gs://mine/first", Hardware(), (), "share a file system"),
        ("/d", Hardware("v5e-16"), (), "TPUs need gke or skypilot"),
        ("/d", Hardware("H100-8", nodes=3), (), "3 nodes cannot have equally many of 8"),
        ("/d", Hardware("H900-8"), (), "H900-8"),
        ("/d", Hardware(), ("--max-running=0",), "--max-running=0 must be at least 1"),
    ],
)
def test_mistakes_are_named(directory: str, hardware: Hardware, flags: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        script(directory, hardware, flags)


def submit(directory: Path) -> int:
    return slurm.submit("first", str(directory), jobs(str(directory)), Hardware(), arguments(slurm))


def test_what_is_in_the_queue_is_not_submitted_again(
    tmp_path: Path,
    tools: Tools,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tools.say("sbatch", "41;here\n")
    tools.say("squeue")
    submit(tmp_path)
    assert tools.calls() == [f"sbatch --parsable {tmp_path}/engine/slurm.sh"]
    assert "array of 3 cells" in capsys.readouterr().out
    tools.say("sbatch", "42\n")
    tools.say("squeue", "41_0\n41_2\n40_1\n")  # cells 3 and 0; and a task of somebody else
    submit(tmp_path)
    assert tools.calls()[-1].startswith("sbatch")
    assert "2 cells of it in the queue already" in capsys.readouterr().out
    text = (tmp_path / "engine" / "slurm.sh").read_text()
    assert "--array=0-0" in text and f"cell {tmp_path} 7)" in text and f"cell {tmp_path} 3)" not in text
    tools.say("squeue", "41_0\n41_2\n42_0\n")
    submit(tmp_path)
    assert not any(call.startswith("sbatch") for call in tools.calls())


def test_a_sweep_is_stopped_where_it_waits_and_where_it_runs(tmp_path: Path, tools: Tools) -> None:
    tools.say("sbatch", "41\n")
    for name in ("squeue", "scontrol", "scancel"):
        tools.say(name)
    submit(tmp_path)
    tools.calls()
    tools.say("squeue", "41_0\n41_1\n41_2\n")
    slurm.stop("first", str(tmp_path), jobs("")[:2])  # cells 0 and 3
    assert tools.calls()[1:] == [
        "scontrol update jobid=41_0,41_2 requeue=0",
        "scancel --quiet --state=PENDING 41_0 41_2",
        "scancel --quiet --state=RUNNING --signal=TERM 41_0 41_2",
    ]
    tools.say("squeue")
    slurm.stop("first", str(tmp_path), jobs(""))
    assert tools.calls() == ["squeue --me --noheader --array --format=%i"]


def test_what_slurm_refuses_is_said(tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.say("sbatch", "sbatch: error: invalid partition specified: gpu\n", code=1)
    with pytest.raises(ConfigError, match="invalid partition"):
        submit(tmp_path)
    assert not (tmp_path / "engine" / "slurm.json").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not installed here"):
        submit(tmp_path)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "slurm.json").write_text("[[1")
    with pytest.raises(ConfigError, match=r"slurm\.json: not readable"):
        submit(tmp_path)
