"""SkyPilot's managed jobs: one for each cell, on TPU VMs and on the GPUs of any cloud, spot machines recovered.

Each job uploads this checkout, installs it with what its accelerator needs, and trains its cell.
"""

import argparse
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.engines.machines import Machines, machines, output
from launch.job import RETRIED, Hardware, Job
from lmjax.errors import DONE, PREEMPTED, ConfigError
from lmjax.plan import topology
from lmjax.record import files

FAMILIES = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
"""Of TPU, as SkyPilot names them."""
RESTARTS_ON_ERRORS = 10
_ENVIRONMENT = "$HOME/lmjax"
WAITS = False


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--infra", metavar="NAME", help="gcp/us-central1, lambda, ...; default: the cheapest")


def render(
    name: str, directory: str, jobs: Sequence[Job], hardware: Hardware, arguments: argparse.Namespace
) -> dict[str, str]:
    """A task for each cell. Raises ConfigError without a bucket, and for TPUs that SkyPilot lacks."""
    if not files.is_remote(directory):
        raise ConfigError(
            f"--out={directory}: the machines share no disk; name a bucket, such as gs://mine/sweeps/first"
        )
    on = machines(hardware)
    ordered = sorted(jobs, key=lambda job: -job.flops)
    return {
        f"{job.name}.yaml": yaml.safe_dump(
            task(directory, job, on, hardware, arguments.infra), sort_keys=False, width=200
        )
        for job in ordered
    }


def submit(name: str, directory: str, jobs: Sequence[Job], hardware: Hardware, arguments: argparse.Namespace) -> int:
    """Launch those that SkyPilot does not have in its queue already, and do not wait for them."""
    queued = _queued()
    for file, text in render(name, directory, jobs, hardware, arguments).items():
        if file.removesuffix(".yaml") in queued:
            print(f"{file.removesuffix('.yaml')} is in the queue already: sky jobs queue")
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file
            path.write_text(text)
            output("sky", "jobs", "launch", "--detach-run", "--yes", str(path))
        print(f"{file.removesuffix('.yaml')} is in the queue")
    return DONE


def stop(name: str, directory: str, jobs: Sequence[Job]) -> int:
    """Cancel the jobs: their machines are taken down, what the last checkpoint lacks is lost."""
    queued = _queued()
    numbers = [str(queued[job.name]) for job in jobs if job.name in queued]
    if numbers:
        output("sky", "jobs", "cancel", "--yes", *numbers)
    print(f"cancelled {len(numbers)} cell{'s' * (len(numbers) != 1)}")
    return DONE


def task(directory: str, job: Job, on: Machines, hardware: Hardware, infra: str | None) -> dict[str, Any]:
    """The task of a cell, as `sky jobs launch` reads it."""
    accelerators = _accelerators(on)
    extras = ["gcp"] if on.kind is None else ["tpu" if on.shape else "cuda", "gcp"]
    return {
        "name": job.name,
        "workdir": ".",
        "num_nodes": 1 if on.shape else on.hosts,  # a slice counts as one
        **({"envs": dict(job.environment)} if job.environment else {}),
        "resources": {
            **({"infra": infra} if infra else {}),
            **({"accelerators": accelerators} if accelerators else {}),
            "use_spot": hardware.spot,
            "job_recovery": _recovery(on),
        },
        "setup": (
            f"pip install uv && uv venv --allow-existing --python=3.12 {_ENVIRONMENT} && "
            f"uv pip install --python={_ENVIRONMENT} --editable='.[{','.join(extras)}]'"
        ),
        "run": f"{_ENVIRONMENT}/bin/{shlex.join(['python', *job.command[1:]])}",
    }


def _recovery(on: Machines) -> dict[str, Any]:
    """Machines that were lost are replaced without end. Of several hosts a 6 may follow from a bug at another, and
    SkyPilot starts again for any host's code: there it counts against a limit."""
    if on.hosts == 1:
        return {"max_restarts_on_errors": 0, "recover_on_exit_codes": sorted(RETRIED)}
    return {"max_restarts_on_errors": RESTARTS_ON_ERRORS, "recover_on_exit_codes": [PREEMPTED]}


def _accelerators(on: Machines) -> str | None:
    if on.kind is None:
        return None
    if not on.shape:
        return f"{on.kind}:{on.devices_of_host}"
    shape = "x".join(map(str, on.shape))
    if on.kind not in FAMILIES:
        raise ConfigError(f"--accelerator={on.kind}: SkyPilot has the TPUs {', '.join(FAMILIES)}")
    number = on.hosts * on.devices_of_host * (2 if topology.FAMILIES[on.kind].cores_named else 1)
    if on.slices > 1 or topology.parse(f"{on.kind}-{number}").shape != on.shape:
        raise ConfigError(
            f"--accelerator={on.slices}x{on.kind}:{shape}: SkyPilot has single slices of the usual shapes; "
            f"use {on.kind}-{number}, or --engine=gke"
        )
    return f"tpu-{FAMILIES[on.kind]}-{number}"


def _queued() -> dict[str, int]:
    """The jobs that wait or run: the number of each name."""
    listed = json.loads(output("sky", "jobs", "queue", "--skip-finished", "--all", "--output=json"))
    return {one["job_name"]: one["job_id"] for one in listed}
