"""What each engine gives its tool for three cells; `python -m tests.launch.rendered` writes the golden files."""

import argparse
from pathlib import Path
from typing import NamedTuple

from launch.engines import gke, skypilot, slurm
from launch.job import Engine, Hardware, Job

GOLDEN = Path(__file__).parent / "golden"


class Case(NamedTuple):
    engine: Engine
    directory: str
    hardware: Hardware
    flags: tuple[str, ...] = ()


CASES = {
    "slurm": Case(
        slurm,
        "/shared/first sweep",
        Hardware("H100-16", nodes=2),
        ("--partition=gpu", "--time=4:00:00", "--max-running=2", "--sbatch=--mem=0"),
    ),
    "gke-tpu": Case(
        gke, "gs://mine/first", Hardware("2xv5e-16", spot=True), ("--image=img:1", "--queue=lab", "--cluster=ours")
    ),
    "gke-gpu": Case(gke, "gs://mine/first", Hardware("H100-16", nodes=2), ("--image=img:1",)),
    "skypilot-tpu": Case(skypilot, "gs://mine/first", Hardware("v5e-16", spot=True)),
    "skypilot-gpu": Case(skypilot, "gs://mine/first", Hardware("H100-16", nodes=2), ("--infra=aws/us-east-1",)),
}


def jobs(directory: str, command: tuple[str, ...] = ()) -> list[Job]:
    """The second is the dearest; the third has a variable of its own."""
    python = "/opt/python/bin/python"
    return [
        Job(
            index=index,
            name=f"first-{index}",
            command=command or (python, "-m", "launch", "cell", directory, str(index)),
            environment={"XLA_FLAGS": "--a=1 --b=2"} if index == 7 else {},
            flops=flops,
        )
        for index, flops in ((0, 1e15), (3, 4e15), (7, 2e15))
    ]


def arguments(engine: Engine, flags: tuple[str, ...] = ()) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    return parser.parse_args(flags)


def render(case: Case) -> dict[str, str]:
    flags = arguments(case.engine, case.flags)
    return case.engine.render("first", case.directory, jobs(case.directory), case.hardware, flags)


def golden(name: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((GOLDEN / name).iterdir())}


if __name__ == "__main__":
    for name, case in CASES.items():
        (GOLDEN / name).mkdir(parents=True, exist_ok=True)
        for file, text in render(case).items():
            (GOLDEN / name / file).write_text(text)
