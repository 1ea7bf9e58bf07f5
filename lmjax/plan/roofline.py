"""How fast a step could be at best: its work on one device over what the chip and its links can do.

    compute   FLOPs of every matrix product the device runs, recomputation included, at the bf16 peak
    memory    every operand and result of those products once between HBM and chip, and the optimizer state read and
              written once; element-wise work is taken as fused into its neighbours
    network   the bytes a device sends in each collective, at the rate of the links that its group spans

A step takes at least the longest of the three, if all overlap, and at most their sum, if none do: real ones lie between
when kernels run near the peak. Latency, input, evaluation and checkpoints are not counted.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lmjax.devices.chips import Chip
from lmjax.models.flops import matrix_products, product_flops
from lmjax.plan.collectives import Collective
from lmjax.plan.topology import Topology


class Work(NamedTuple):
    """What one device does in one step."""

    flops: float
    hbm_bytes: float


class Estimate(NamedTuple):
    """Seconds per step."""

    compute: float
    memory: float
    network: float

    @property
    def fastest(self) -> float:
        """Everything overlaps."""
        return max(self)

    @property
    def slowest(self) -> float:
        """The time if nothing overlaps."""
        return sum(self)


def work(jaxpr: Any, *, visible: float, state_bytes: float) -> Work:
    """What one device does in a step that is traced on a mesh of explicit axes, where types say what lies where.

    `visible` is the part of all (query, key) pairs that the mask shows: what an attention kernel computes of its grid.
    """
    flops, moved = 0.0, 2.0 * state_bytes
    for product in matrix_products(jaxpr):
        flops += product_flops(product, local_shape) * (visible if product.in_kernel else 1)
        if not product.in_kernel:
            operands = [*product.equation.invars, *product.equation.outvars]
            moved += product.times * sum(local_bytes(variable.aval) for variable in operands)
    return Work(flops, moved)


def local_shape(aval: Any) -> tuple[int, ...]:
    """One device's part; within shard_map a type is of one part already."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return aval.shape

    def pieces(entry: Any) -> int:
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        return math.prod(sharding.mesh.shape[axis] for axis in axes)

    return tuple(size // pieces(entry) for size, entry in zip(aval.shape, sharding.spec.partitions, strict=True))


def local_bytes(aval: Any) -> int:
    return math.prod(local_shape(aval)) * aval.dtype.itemsize


def estimate(chip: Chip, work: Work, network: float) -> Estimate | None:
    """None for a chip whose memory bandwidth is not known."""
    if chip.hbm_bandwidth is None:
        return None
    return Estimate(work.flops / chip.flops, work.hbm_bytes / chip.hbm_bandwidth, network)


class Place(NamedTuple):
    """Where a device is."""

    slice: int
    coords: tuple[int, ...]
    """The place of its chip in the torus."""


def place(device: Any) -> Place:
    """A CPU counts as a chip in a row of them."""
    return Place(getattr(device, "slice_index", 0), tuple(getattr(device, "coords", (device.id,))))


def network_seconds(
    chip: Chip, topology: Topology, places: Sequence[Place], found: Iterable[Collective]
) -> float | None:
    """The time of all collectives, one after another; None where a bandwidth is not known.

    `places` are those of the devices in the order of the mesh. Between slices goes what is left after each has done
    its part: every device sends its share of it.
    """
    seconds = 0.0
    for one in found:
        group = [places[position] for position in one.group]
        slices = len({place.slice for place in group})
        inside = len(group) // slices
        across = one.sent_by(slices) / (1 if one.kind == "all-to-all" else inside)
        if chip.link is None or (across and chip.dcn is None):
            return None
        seconds += _slice_seconds(one, inside, _spans(topology, group)) / chip.link
        seconds += across / chip.dcn if chip.dcn and across else 0.0
    return seconds


def _spans(topology: Topology, group: list[Place]) -> list[tuple[int, bool]]:
    """The dimensions of the torus along which a group extends: how many chips far, and whether they close to a ring."""
    widths = [len(set(along)) for along in zip(*(place.coords for place in group), strict=True)]
    dimensions = zip(widths, topology.shape, topology.wraps, strict=False)  # every TPU has three coordinates
    return [(width, wraps and width == size) for width, size, wraps in dimensions if width > 1]


def _slice_seconds(one: Collective, devices: int, spans: list[tuple[int, bool]]) -> float:
    """Bytes that pass one link, one way, of a collective among so many devices of a slice.

    A ring along each dimension, all at once: two links per chip, or one where the dimension does not close. In an
    all-to-all the busiest link of a ring of n chips carries n/8 times the array of a device, of a line n/4 (Austin et
    al. 2025, How to Scale Your Model, part 3).
    """
    if one.kind == "all-to-all":
        return one.times * one.bytes * max((width / (8 if closed else 4) for width, closed in spans), default=0.0)
    links = sum(2 if closed else 1 for _, closed in spans)
    return one.sent_by(devices) / max(links, 1)
