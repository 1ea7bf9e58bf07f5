"""What starts the cells of a sweep: a registry of modules, each an `Engine` (launch/job.py)."""

from launch.engines import gke, local, skypilot, slurm
from launch.job import Engine

ENGINES: dict[str, Engine] = {"local": local, "slurm": slurm, "gke": gke, "skypilot": skypilot}
