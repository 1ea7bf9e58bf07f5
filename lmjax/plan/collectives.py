"""What a compiled program sends between devices, read from its text.

XLA's text names every collective, in the computation it belongs to. A loop's body is written once and runs as often as
its condition says; fusions, asynchronous wrappers and branches are followed to the computations they call.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective operation of one device."""

    kind: str
    bytes: int
    """Bytes of the whole array on one device: the result of an all-gather, the operand of the others."""
    group: tuple[int, ...]
    """The devices that take part, as positions in the mesh; of several groups alike, the first."""
    times: int = 1
    """How often it runs in one execution of the program."""
    shape: str = ""
    name: str = ""
    """The operation of the source program it comes from."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all runs."""
        return self.sent_by(len(self.group))

    def sent_by(self, devices: int) -> float:
        """`sent`, were the group of so many devices: by the bandwidth-optimal ring, (n-1)/n of the array per pass.

        An all-reduce passes twice; a permutation sends the array once.
        """
        passes = {"all-reduce": 2, "collective-permute": devices / max(devices - 1, 1)}.get(self.kind, 1)
        return self.times * self.bytes * passes * (devices - 1) / devices

    def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes along which the devices of the group differ."""
        where = np.array(np.unravel_index(np.array(self.group), tuple(mesh_shape.values())))
        return tuple(axis for axis, places in zip(mesh_shape, where, strict=True) if len(set(places.tolist())) > 1)


class _Call(NamedTuple):
    computation: str
    condition: str | None = None
    """The condition under which it is repeated."""
    first: int = 0
    """Where the repetition starts to count: after the rounds that XLA has taken out of the loop."""
    fused: bool = False
    branches: tuple[str, ...] = ()
    """The branches of a switch, of which one runs: `computation` is the first."""


class _Computation(NamedTuple):
    collectives: list[tuple[str, Collective]]
    """(its identity, collective)"""
    calls: list[_Call]
    bounds: list[int]
    """The integer constants: of a loop's condition, how often it holds, if a count decides."""


def collectives(text: str) -> list[Collective]:
    """Every collective of `compiled.as_text()` that sends anything, with how often it runs.

    A TPU program may spread one collective over several fusions, to overlap it with work: these count once. An
    all-reduce in a fusion named for the slice that follows it is a reduce-scatter, and is called that. A ragged
    all-to-all, whose bytes the data decides, counts as one of equal parts. A loop whose rounds the data decides, with
    no bound in its condition, counts once, and so does its condition. Of a switch the branch that sends most counts.
    """
    computations, entry = _computations(text)

    def sent(name: str) -> float:
        return sum(one.sent for one in visit({}, name, 1, False).values())

    def visit(found: dict[Any, Collective], name: str, times: int, fused: bool) -> dict[Any, Collective]:
        for identity, one in computations[name].collectives:
            if len(one.group) > 1:
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else one.kind
                key = (identity, times, one._replace(name="")) if fused else len(found)
                found.setdefault(key, one._replace(kind=kind, times=times))
        for call in computations[name].calls:
            rounds = 1
            if call.condition is not None:
                rounds = max([1, *(bound - call.first for bound in computations[call.condition].bounds)])
                visit(found, call.condition, times * rounds, fused)
            computation = max(call.branches, key=sent) if call.branches else call.computation
            if computation in computations:
                visit(found, computation, times * rounds, fused or call.fused)
        return found

    return list(visit({}, entry, 1, False).values())


_CONSTANT = re.compile(r"^[su]\d+\[\]\S* constant\((\d+)\)")


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current, defined = "", _Computation([], [], []), dict[str, str]()
    partitions = int(next(iter(re.findall(r"num_partitions=(\d+)", text)), 1))
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current, defined = _Computation([], [], []), {}
            computations[header[2]] = current
            entry = header[2] if header[1] else entry
            continue
        instruction = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
        if instruction:
            name, what = instruction.groups()
            defined[name] = what
            current.collectives.extend(_collective(what, partitions, defined))
            current.calls.extend(_calls(what, defined))
            current.bounds.extend(map(int, _CONSTANT.findall(what)))
    assert entry, "no ENTRY computation: is it the text of a compiled program?"
    return computations, entry


# `bf16[16,2048]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), ...`; a tuple of results is in parentheses.
_COLLECTIVE = re.compile(
    rf"(?P<result>.*?) (?P<ragged>ragged-)?(?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<operands>.*?)\),"
)


# Between slices a TPU program sends through the host: `(bf16[48,8,128]{...}, ...) send(%x), channel_id=12, ...`.
_BETWEEN_SLICES = re.compile(
    r"\((?P<dtype>\w+)\[(?P<dims>[\d,]*)\].* send\(.*channel_id=(?P<channel>\d+),.*"
    r'_xla_megascale_target="\{(?P<slices>[\d,]+)\}x\{0(?::(?P<last>\d+))?\}".*_xla_megascale_transfer_type="(?P<kind>\w+)"'
)


def _collective(instruction: str, partitions: int, defined: Mapping[str, str]) -> Iterator[tuple[str, Collective]]:
    match = _BETWEEN_SLICES.match(instruction)
    if match:
        kind, slices = match["kind"].lower().replace("_", "-"), len(match["slices"].split(","))
        assert kind in KINDS, f"an unknown transfer between slices: {instruction[:300]}"
        n_bytes = _array_bytes(match["dtype"], match["dims"]) * (slices if kind == "all-gather" else 1)
        group = tuple(slice_ * (int(match["last"] or 0) + 1) for slice_ in range(slices))
        yield match["channel"], Collective(kind, n_bytes, group, 1, f"{match['dtype']}[{match['dims']}]")
    match = _COLLECTIVE.match(instruction)
    if match is None:
        return
    kind, shapes = match["kind"], re.findall(r"(\w+)\[([\d,]*)\]", match["result"])
    sizes = [_array_bytes(dtype, dims) for dtype, dims in shapes]
    if match["ragged"]:  # to or from an array with room for whatever may come
        operand = re.match(r"(\w+)\[([\d,]*)\]", defined.get(match["operands"].split(",")[0].lstrip("%"), ""))
        sizes.append(_array_bytes(*operand.groups()) if operand else sizes[0])
        sizes = [min(sizes)]
    if match["start"] and kind in ("all-gather", "collective-permute"):  # the result holds the operand, too
        sizes = sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[:1]
    group = _group(instruction, partitions)
    n_bytes = sum(sizes) * (len(group) if kind == "reduce-scatter" else 1)
    name = re.search(r'op_name="([^"]*)"', instruction)
    shape = ", ".join(f"{dtype}[{dims}]" for dtype, dims in shapes[:1])
    # Collectives inside shard_map share a channel: where several fusions do, the chain they form has a name, too.
    identity = re.search(r'(?:chain_id|async_collective_name)="[^"]*"', instruction)
    identity = identity or re.search(r"channel_id=\d+", instruction)
    assert identity, f"a collective without a channel: {instruction[:200]}"
    yield identity[0], Collective(kind, n_bytes, group, 1, shape, name[1] if name else "")


def _calls(instruction: str, defined: Mapping[str, str]) -> Iterator[_Call]:
    loop = re.search(r" while\(%?([\w.\-]+)\), condition=%?([\w.\-]+), body=%?([\w.\-]+)", instruction)
    if loop:
        yield _Call(loop[3], condition=loop[2], first=_first(loop[1], defined))
    for name in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", instruction):
        yield _Call(name, fused=" fusion(" in instruction)
    for names in re.findall(r"called_computations=\{([^}]*)\}", instruction):
        yield from map(_Call, _names(names))
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction)
    branches = branches or re.search(r"true_computation=([^,]*, false_computation=[^,]*)", instruction)
    if branches:
        names = _names(branches[1].replace("false_computation=", ""))
        yield _Call(names[0], branches=tuple(names))


def _names(listed: str) -> list[str]:
    """`%a, %b` -> a, b"""
    return [name.strip().lstrip("%") for name in listed.split(",")]


def _first(name: str, defined: Mapping[str, str]) -> int:
    """The constant that a copy is of, or the first member of a tuple."""
    what = defined.get(name, "")
    constant, of = _CONSTANT.match(what), re.search(r" (?:copy|tuple)\(%?([\w.\-]+)", what)
    return int(constant[1]) if constant else _first(of[1], defined) if of else 0


def _group(instruction: str, partitions: int) -> tuple[int, ...]:
    """The first group of devices: `{{0,1},{2,3}}`, `[2,2]<=[2,2]T(1,0)`, `mesh['a'=2,'b'=2] {'a'}`; none means all."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", instruction)
    if pairs:
        return tuple(map(int, pairs.groups()))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", instruction)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    meshed = _MESH.search(instruction)
    if meshed:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", meshed["axes"])}
        along = tuple(slice(None) if f"'{axis}'" in meshed["along"] else 0 for axis in sizes)
        devices = _tiled(meshed["dims"] or str(math.prod(sizes.values())), meshed["order"])
        return tuple(devices.reshape(tuple(sizes.values()))[along].ravel().tolist())
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction)
    if tiled is None:
        assert "replica_groups={}" in instruction or "replica_groups" not in instruction, instruction[:300]
        return tuple(range(partitions))
    first, *_ = _tiled(tiled[2], tiled[3]).reshape(tuple(map(int, tiled[1].split(","))))
    return tuple(first.tolist())


# `mesh['a'=2,'b'=4] {'a'}`: the devices in order; with `device_ids=([2,4]T(1,0))`, in that order.
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<axes>'[^\]]*)\](?:, device_ids=\(\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))? "
    r"\{(?P<along>[^}]*)\}"
)


def _tiled(dims: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in the shape `2,4`, its axes transposed to the order `1,0`."""
    shape = tuple(map(int, dims.split(",")))
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose(tuple(map(int, order.split(",")))) if order else devices


_BITS = {"pred": 8, "bf16": 16}


def _array_bytes(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"\D*(\d+).*", r"\1", dtype) or 0)
    return math.prod(int(size) for size in dims.split(",") if size) * bits // 8


def by_kind(found: Sequence[Collective]) -> dict[str, float]:
    """Bytes that a device sends in each kind of collective."""
    return {kind: sum(one.sent for one in found if one.kind == kind) for kind in KINDS}
