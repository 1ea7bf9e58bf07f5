"""Which cells train together: those of one program, that differ in seeds and scalars alone (`lmjax/cells.py`)."""

import argparse
from collections.abc import Mapping, Sequence

from launch import job
from launch.engines import local
from launch.job import Job
from launch.manifest import Entry
from lmjax.errors import ConfigError

MOST = 8
"""Cells of a stack that is sized by itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stack",
        type=_size,
        default=1,
        metavar="auto|N",
        help=f"local: up to N cells of equal shapes in one process; auto: at most {MOST}, and some for every job",
    )


def _size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is neither auto nor a number of cells")
    return int(text)


def jobs(
    name: str,
    directory: str,
    cells: Sequence[Entry],
    arguments: argparse.Namespace,
    after: Mapping[int, int] | None = None,
) -> list[Job]:
    """The jobs of the sweep called `name` in `directory`; `after` says which cell another one comes after.

    Raises ConfigError for an engine that starts cells alone.
    """
    after = after or {}
    if arguments.engine != "local" and arguments.stack not in (None, 1):
        raise ConfigError(
            f"--stack={arguments.stack}: --engine={arguments.engine} starts each cell alone; leave it out"
        )
    at_a_time = local.at_a_time(arguments) if arguments.engine == "local" else len(cells)
    found = [stack for same in alike(cells, after) for stack in dealt(same, at_a_time, arguments.stack)]
    stacks = sorted(found, key=lambda stack: stack[0].index)
    if len(stacks) < len(cells):
        print(f"{len(cells)} cells in {len(stacks)} processes: those that differ in seeds and scalars alone together")
    return [job.of(name, directory, stack, after.get(stack[0].index)) for stack in stacks]


def alike(cells: Sequence[Entry], after: Mapping[int, int]) -> list[list[Entry]]:
    """Groups of cells that may train together: of one program, and all after the same cell. Each of an older sweep,
    which does not name its program, is alone."""
    groups: dict[tuple[str, int | None], list[Entry]] = {}
    for cell in cells:
        groups.setdefault((cell.program or cell.digest, after.get(cell.index)), []).append(cell)
    return list(groups.values())


def dealt(cells: Sequence[Entry], at_a_time: int, size: int | None) -> list[list[Entry]]:
    """The cells in stacks of equal size: of at most `size`, or else so many that every job has some."""
    most = size or min(MOST, -(-len(cells) // at_a_time))
    count = -(-len(cells) // most)
    return [list(cells[place::count]) for place in range(count)]
