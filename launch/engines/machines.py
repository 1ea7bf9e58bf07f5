"""What the name of an accelerator means in hosts, and the tool of an engine: what all engines ask."""

import shlex
import subprocess
from typing import NamedTuple

from launch.job import Hardware, Job
from lmjax.devices import chips
from lmjax.errors import ConfigError
from lmjax.plan import topology

CHIPS_OF_HOST = 4
"""Of a TPU slice of more than one chip, on GKE: the machine types of Google that end in -4t."""


class Machines(NamedTuple):
    """What one job runs on, host by host."""

    kind: str | None
    """The family of a TPU, `v5e`, or the name of a GPU, `H100`; None is CPUs."""
    slices: int
    shape: tuple[int, ...]
    """Chips along each dimension of a TPU slice; empty for all else."""
    hosts: int
    """Of one slice."""
    devices_of_host: int
    """Chips or GPUs."""


def machines(hardware: Hardware) -> Machines:
    """The number in `H100-16` counts the GPUs of all nodes together. Raises ConfigError for a name that means nothing,
    and for GPUs that the nodes cannot share evenly."""
    name, nodes = hardware.accelerator, hardware.nodes
    if name is None:
        return Machines(None, 1, (), nodes, 0)
    if (gpus := chips.gpus(name)) is not None:
        kind, number = gpus
        if number % nodes:
            raise ConfigError(f"--accelerator={name}: {nodes} nodes cannot have equally many of {number}; set --nodes")
        return Machines(kind, 1, (), nodes, number // nodes)
    target = topology.parse(name)
    if target.family == "cpu":
        return Machines(None, 1, (), nodes, 0)
    of_slice = target.chips // target.slices
    on_host = min(CHIPS_OF_HOST, of_slice)
    return Machines(target.family, target.slices, target.shape, of_slice // on_host, on_host)


def shell_line(job: Job, python: str) -> str:
    """What a shell runs for a job, with the Python that is there."""
    variables = [f"{name}={value}" for name, value in job.environment.items()]
    return shlex.join([*(["env", *variables] if variables else []), python, *job.command[1:]])


def output(*command: str, given: str = "") -> str:
    """What a tool printed. Raises ConfigError where it is not installed, or refuses."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]} is not installed here; run this where it is") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise ConfigError(f"{' '.join(command[:3])}: {said.splitlines()[-1]}")
    return done.stdout
