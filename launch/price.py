"""What the cells of a sweep cost, before anything is spent: sizes, tokens, FLOPs, memory, hours, dollars.

All of it in closed form, a millisecond a cell. FLOPs are the exact ones, of matmuls and causal attention; beside them
stand 6ND with N the parameters that a token passes through.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh

from lmjax.cells import Cell
from lmjax.config import Config
from lmjax.devices import chips
from lmjax.devices.chips import Chip
from lmjax.devices.mesh import axis_sizes, check_divides, mesh_axes
from lmjax.errors import ConfigError, DataError
from lmjax.optim import optimizers
from lmjax.optim.config import OptimizerConfig
from lmjax.plan import search, topology
from lmjax.registry import without_data
from lmjax.run import assemble, dry_run
from lmjax.tasks.task import Task
from lmjax.train.accounting import Cost
from lmjax.weights import Counts, Weight, abstract, by_path, count

FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What a cell runs on."""

    name: str
    devices: int
    chip: Chip | None
    dollars: float | None
    """Of one device for one hour."""
    share_of_peak: float
    """Of FLOP/s and network, that is assumed to be reached."""


@dataclasses.dataclass(frozen=True)
class Price:
    """Of one cell."""

    counts: Counts
    tokens: int
    flops_6nd: int
    flops: int
    """Exact, attention causal."""
    epochs: dict[str, float | None]
    state_bytes: float
    """Of weights, their average, gradients and optimizer state on one device; activations come on top."""
    hours: float | None
    dollars: float | None


def accelerator(name: str | None, *, share_of_peak: float, dollars: float | None) -> Accelerator:
    """That of a name: a TPU slice such as `v5e-16` or `2xv5p-256`, GPUs such as `H100-8`; None is this machine's CPU.

    `dollars` is the price of a device for an hour, where the table's is not meant. Raises ConfigError for an unknown
    name.
    """
    if not 0 < share_of_peak <= 1:
        raise ConfigError(f"--share-of-peak={share_of_peak} must lie above 0 and be at most 1")
    if name is None:
        return Accelerator("this machine", 1, None, dollars, share_of_peak)
    if (gpus := chips.gpus(name)) is not None:
        kind, number = gpus
        return Accelerator(name, number, chips.CHIPS[kind], dollars or chips.CHIPS[kind].dollars, share_of_peak)
    try:
        target = topology.parse(name)
    except ConfigError:
        raise ConfigError(
            f"--accelerator={name}: write a TPU slice, such as v5e-16 or 2xv5p-256, or GPUs, such as H100-8"
        ) from None
    chip = chips.chip("TPU7x" if target.family == "tpu7x" else f"TPU {target.family}")  # None for fake CPU devices
    return Accelerator(name, target.devices, chip, dollars or (chip and chip.dollars), share_of_peak)


def price_all(cells: Sequence[Cell], on: Accelerator) -> list[Price]:
    """Of every cell. Raises ConfigError that names the first cell which cannot run there, or whose data cannot be
    had."""
    known: dict[tuple[tuple[str, str], ...], dry_run.Manifests] = {}
    prices = []
    for index, cell in enumerate(cells):
        sources = tuple((name, source.path) for name, source in cell.cfg.data.sources.items())
        try:
            if sources not in known:
                known[sources] = dry_run.read_manifests(cell.cfg)
            prices.append(price(cell.cfg, known[sources], on))
        except (ConfigError, DataError) as error:
            raise type(error)(f"cell {index}: {error}") from None
    return prices


def price(cfg: Config, manifests: dry_run.Manifests, on: Accelerator) -> Price:
    """Raises ConfigError for a mesh that does not fit or divide, and DataError for data that cannot be had."""
    for name, source in cfg.data.sources.items():
        found = manifests[name]
        if found is None and source.prepare is None:
            raise DataError(f"data.sources.{name}: {source.path} is not prepared; run lmjax prepare, or give a recipe")
        if found is not None and source.tokens is not None and source.tokens > found.splits["train"].tokens:
            raise DataError(f"data.sources.{name}.tokens={source.tokens:,} is more than {source.path} has")
    cfg = dry_run.with_vocab(cfg, manifests)
    task, sizes = without_data(cfg), axis_sizes(cfg.mesh, on.devices)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    assemble.check_fits(mesh, cfg)
    run = Cost(0, 0, 0, 0, 0).plus(cfg.train.steps * cfg.train.batch, task.cost)
    hours = None
    if on.chip is not None:
        hours = cfg.train.steps * search.rough_seconds(cfg, sizes, on.chip) / on.share_of_peak / 3600
    return Price(
        counts=count(task.spec),
        tokens=run.tokens,
        flops_6nd=run.flops_6nd,
        flops=run.flops_causal,
        epochs=dry_run.epochs(cfg, manifests),
        state_bytes=state_bytes(task, mesh),
        hours=hours,
        dollars=None if hours is None or on.dollars is None else hours * on.dollars * on.devices,
    )


def state_bytes(task: Task, mesh: AbstractMesh) -> float:
    """Of weights, their average, gradients and optimizer state on one device; Adafactor's small state is rounded.

    Raises ConfigError for a weight that the mesh does not divide.
    """
    n_bytes, copies = 0.0, 3 if task.cfg.train.average_decay else 2
    for weight in by_path(task.spec).values():
        kept = _kept(task.cfg.optimizer, weight)
        n_bytes += FLOAT32_BYTES * (copies + kept) * weight.size / shards(weight, mesh)
    return n_bytes


def shards(weight: Weight, mesh: AbstractMesh) -> int:
    """Into how many the mesh cuts a weight. Raises ConfigError where it does not divide it."""
    for name, size in zip(weight.names, weight.shape, strict=True):
        check_divides(name, size, mesh)
    return math.prod(mesh.shape[axis] for name in weight.names for axis in mesh_axes(name, mesh))


_KEPT: dict[tuple[str, str, str], float] = {}


def _kept(optimizer: OptimizerConfig, weight: Weight) -> float:
    """Numbers that the optimizer keeps for each number of a weight. Tracing tells, once for all sizes."""
    key = (repr(optimizer), weight.axes, weight.kind)
    if key not in _KEPT:
        spec = {"weight": weight}
        state = jax.eval_shape(optimizers.build(optimizer, spec).init, abstract(spec))
        _KEPT[key] = sum(math.prod(x.shape) for x in jax.tree.leaves(state)) / weight.size
    return _KEPT[key]
