"""A Slurm cluster: one array of all cells, at most --max-running at a time, the dearest first.

The script goes to DIR/engine/slurm.sh, the numbers of the arrays to DIR/engine/slurm.json. A cell that was preempted,
that lost a host or whose time is up goes back to the queue by itself. The hosts must share DIR and this checkout.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.engines.machines import machines, output, shell_line
from launch.job import MAX_RESTARTS, Hardware, Job
from lmjax.errors import DONE, ConfigError
from lmjax.record import files

RECORD = "slurm.json"

# srun returns the highest code of all hosts, and those that lose another one end with 6: so what another start would
# not mend is lifted above 6 there, and put back here. `trap` has the shell on each host leave SIGTERM to the cell;
# --wait kills what is left a minute after the first has ended. 137 and 143 are a process that was killed.
_RUN = """\
each='trap : TERM; "$@"; code=$?; case $code in 1 | 2 | 3 | 4 | 5) exit 20$code ;; esac; exit $code'
srun --kill-on-bad-exit=0 --wait=60 bash -c "$each" - "${{cell[@]}}"
code=$?
case $code in
201 | 202 | 203 | 204 | 205) code=$((code - 200)) ;;
6 | 75 | 137 | 143)
  [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ] && scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" ;;
esac
exit $code
"""
WAITS = False


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--partition", metavar="NAME", help="default: the cluster's")
    parser.add_argument("--time", metavar="D-HH:MM:SS", help="after which a cell saves and queues again")
    parser.add_argument("--max-running", type=int, metavar="N", help="cells at a time; default: all that fit")
    parser.add_argument("--sbatch", action="append", default=[], metavar="FLAG", help="another, --sbatch=--mem=64G")


def render(
    name: str, directory: str, jobs: Sequence[Job], hardware: Hardware, arguments: argparse.Namespace
) -> dict[str, str]:
    """The script for sbatch. Raises ConfigError for TPUs, and for a directory that the hosts cannot share."""
    if files.is_remote(directory):
        raise ConfigError(
            f"--out={directory}: the hosts of a Slurm cluster share a file system; name a directory there"
        )
    if arguments.max_running is not None and arguments.max_running < 1:
        raise ConfigError(f"--max-running={arguments.max_running} must be at least 1")
    on = machines(hardware)
    if on.shape:
        raise ConfigError(f"--accelerator={hardware.accelerator}: Slurm has GPUs or CPUs; TPUs need gke or skypilot")
    limit = "" if arguments.max_running is None else f"%{arguments.max_running}"
    logs = str(_folder(directory)).replace("%", "%%") + "/%A_%a.out"
    flags = [
        f"--job-name={name}",
        f"--array=0-{len(jobs) - 1}{limit}",
        f"--nodes={on.hosts}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={on.devices_of_host}"] if on.devices_of_host else []),
        *([f"--partition={arguments.partition}"] if arguments.partition else []),
        *([f"--time={arguments.time}"] if arguments.time else []),
        "--requeue",
        "--open-mode=append",
        "--signal=TERM@120",
        f"--output={logs}",
        *arguments.sbatch,
    ]
    cells = [f"{task}) cell=({shell_line(job, job.command[0])}) ;;" for task, job in enumerate(_dearest_first(jobs))]
    lines = ["#!/bin/bash", *(f"#SBATCH {shlex.quote(flag)}" for flag in flags)]
    lines += ["case $SLURM_ARRAY_TASK_ID in # Slurm starts the tasks of an array in order", *cells, "esac"]
    return {"slurm.sh": "\n".join(lines) + "\n" + _RUN.format(restarts=MAX_RESTARTS)}


def submit(name: str, directory: str, jobs: Sequence[Job], hardware: Hardware, arguments: argparse.Namespace) -> int:
    """Put the cells in the queue that are not in it already."""
    queued = set(_queued(directory).values())
    jobs = [job for job in jobs if job.index not in queued]
    if queued:
        print(f"{len(queued)} cell{'s' * (len(queued) > 1)} of it in the queue already: squeue --me")
    if not jobs:
        return DONE
    script = render(name, directory, jobs, hardware, arguments)["slurm.sh"]
    folder = _folder(directory)
    with files.reporting(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "slurm.sh").write_text(script)
    number = int(output("sbatch", "--parsable", str(folder / "slurm.sh")).split(";")[0])
    arrays = [*_arrays(directory), (number, [job.index for job in _dearest_first(jobs)])]
    with files.reporting(folder, "write"):
        files.write_atomically(folder / RECORD, json.dumps(arrays))
    print(f"Slurm job {number}: an array of {len(jobs)} cells; squeue --job={number} shows it")
    return DONE


def stop(name: str, directory: str, jobs: Sequence[Job]) -> int:
    """Take what waits from the queue, and have what runs save; it does not queue again."""
    wanted = {job.index for job in jobs}
    tasks = [task for task, cell in _queued(directory).items() if cell in wanted]
    if tasks:
        output("scontrol", "update", f"jobid={','.join(tasks)}", "requeue=0")
        output("scancel", "--quiet", "--state=PENDING", *tasks)
        output("scancel", "--quiet", "--state=RUNNING", "--signal=TERM", *tasks)
    print(f"asked {len(tasks)} cell{'s' * (len(tasks) != 1)} to end")
    return DONE


def _dearest_first(jobs: Sequence[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: -job.flops)


def _folder(directory: str) -> Path:
    return Path(directory).absolute() / "engine"


def _arrays(directory: str) -> list[tuple[int, list[int]]]:
    """(Slurm's number, the cell of each task) of each array that was submitted."""
    path = _folder(directory) / RECORD
    try:
        return [(int(number), list(map(int, cells))) for number, cells in json.loads(path.read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not readable ({error}); remove it, and see squeue --me for what runs") from None


def _queued(directory: str) -> dict[str, int]:
    """The cells that wait or run, by Slurm's name of their tasks, such as 17_3."""
    known = {f"{number}_{task}": cell for number, cells in _arrays(directory) for task, cell in enumerate(cells)}
    listed = output("squeue", "--me", "--noheader", "--array", "--format=%i").split() if known else []
    return {task: known[task] for task in listed if task in known}
