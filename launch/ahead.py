"""What XLA says that the steps of cells need, compiled ahead of time for machines that are not here: `--compile`."""

from collections.abc import Sequence
from typing import Any

from launch.price import Accelerator
from lmjax.cells import Cell, program
from lmjax.devices import chips
from lmjax.errors import ConfigError
from lmjax.plan import topology
from lmjax.plan.step import make_plan
from lmjax.plan.table import verdict
from lmjax.plan.topology import Topology
from lmjax.run.dry_run import with_known_vocab


def target(on: Accelerator) -> Topology:
    """What to compile for; call it before JAX looks for devices. Raises ConfigError for GPUs."""
    if on.chip is not None and chips.gpus(on.name) is not None:
        raise ConfigError(
            f"--compile: XLA compiles for TPUs and CPUs that are not here, not for {on.name}; leave it out"
        )
    found = topology.parse("cpu-1" if on.chip is None and on.devices == 1 else on.name)
    topology.prepare_process(found)
    return found


def step_bytes(cells: Sequence[Cell], on: Topology) -> list[float]:
    """On one device, for each cell. Cells of one program share what it needs.

    Raises ConfigError that names the first cell which does not fit.
    """
    devices: list[Any] = topology.devices(on)
    needed: dict[str, float] = {}
    found = []
    for index, cell in enumerate(cells):
        name = program(cell.cfg)
        if name not in needed:
            try:
                plan = make_plan(with_known_vocab(cell.cfg), on, devices)
            except ConfigError as error:
                raise ConfigError(f"cell {index}: {error}") from None
            if not plan.fits:
                raise ConfigError(f"cell {index}: {verdict(plan)}; `lmjax plan --search` finds what does")
            needed[name] = plan.needed
        found.append(needed[name])
    return found
