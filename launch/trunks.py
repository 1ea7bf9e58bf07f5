"""Cells that branch from another one of their sweep: `"train.branch_from": "NAME@STEP"`, with that cell's name.

The launcher puts its work directory in the place of the name. A branch starts when its trunk has ended.
"""

import dataclasses
from collections.abc import Sequence

from launch.manifest import Entry
from lmjax.cells import Cell
from lmjax.config import Config
from lmjax.errors import ConfigError
from lmjax.run import branch


def resolved(entries: Sequence[Entry], cells: Sequence[Cell]) -> list[Entry]:
    """The entries of these cells with their trunks, and with time and price of their own steps alone.

    Raises ConfigError for a branch that is not the run which its config says, or whose trunk does not keep its step.
    """
    return [_resolved(entry, cell, entries, cells) for entry, cell in zip(entries, cells, strict=True)]


def _resolved(entry: Entry, cell: Cell, entries: Sequence[Entry], cells: Sequence[Cell]) -> Entry:
    origin = cell.cfg.train.branch_from
    if origin is None:
        return entry
    name, _, number = origin.rpartition("@")
    named = [other for other in entries if other.name == name and other is not entry]
    try:
        if len(named) > 1:
            raise ConfigError(f"train.branch_from={origin}: {len(named)} cells have that name; give them others")
        if named:
            if not number.isdigit():
                raise ConfigError(f"train.branch_from={origin}: say at which step, {name}@STEP")
            step, trunk = int(number), named[0].index
            check_kept(step, cells[trunk].cfg, origin)
            branch.check_same_until(step, cells[trunk].cfg, cell.cfg)
        else:  # a run from elsewhere
            (_, step), trunk = branch.check(cell.cfg), None
    except ConfigError as error:
        raise ConfigError(f"cell {entry.index}: {error}") from None
    entry = dataclasses.replace(entry, trunk=trunk, first_step=step)
    return dataclasses.replace(
        entry,
        hours=None if entry.hours is None else entry.hours * entry.share,
        dollars=None if entry.dollars is None else entry.dollars * entry.share,
    )


def check_kept(step: int, trunk: Config, origin: str) -> None:
    """Raise ConfigError unless a run keeps its checkpoint of a step to its end."""
    every, forever = trunk.checkpoint.every, trunk.checkpoint.keep_every
    last = step == trunk.train.steps
    if not 0 < step <= trunk.train.steps or not (
        last or (every and step % every == 0 and forever and step % forever == 0)
    ):
        raise ConfigError(
            f"train.branch_from={origin}: its trunk keeps no checkpoint of step {step}; it trains "
            f"{trunk.train.steps} steps with checkpoint.every={every} and checkpoint.keep_every={forever}"
        )
