"""Hardware that is not here: `v5e-256`, `v5p:4x4x8`, `2xv6e-256`, `cpu-8` -> devices to compile a program for.

Names are Google's: the number counts chips for v5e and v6e, and TensorCores, two of them per chip, for v4, v5p and
tpu7x, so that v5p-256 has 128 chips. `v5p:4x4x8` gives the shape in chips, `2x` in front means two slices, connected
by the data-center network.
"""

import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from lmjax.errors import ConfigError


class Family(NamedTuple):
    """One generation of TPU, as Google sells it and as libtpu names it."""

    libtpu: str
    torus: int
    """Dimensions of the network inside a slice."""
    largest: tuple[int, ...]
    """Chips along each dimension of the largest slice."""
    cores_named: bool
    """The number in a name counts TensorCores, two per chip."""
    megacore: bool = False
    """The two TensorCores of a chip are one JAX device."""
    devices_per_chip: int = 1


FAMILIES: dict[str, Family] = {
    "v4": Family("v4", 3, (16, 16, 16), cores_named=True, megacore=True),
    "v5e": Family("v5e", 2, (16, 16), cores_named=False),
    "v5p": Family("v5", 3, (16, 16, 24), cores_named=True, megacore=True),
    "v6e": Family("v6e", 2, (16, 16), cores_named=False),
    "tpu7x": Family("tpu7x", 3, (16, 16, 36), cores_named=True, devices_per_chip=2),
}
# The shapes smaller than a cube of 4 x 4 x 4, and all shapes of two dimensions, that can be had.
SMALL: dict[int, list[tuple[int, ...]]] = {
    2: [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)],
    3: [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)],
}
_NAME = re.compile(r"(?:(?P<slices>\d+)x)?(?P<family>[a-z0-9]+?)(?:-(?P<number>\d+)|:(?P<shape>\d+(?:x\d+)*))")
_ALIASES = {"v5litepod": "v5e"}


class Topology(NamedTuple):
    """Slices of one kind of chip, or fake CPU devices."""

    name: str
    family: str
    """A key of FAMILIES, or cpu."""
    shape: tuple[int, ...]
    """Chips along each dimension of one slice."""
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * (1 if self.family == "cpu" else FAMILIES[self.family].devices_per_chip)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each dimension of the network closes to a ring: on v5e and v6e at 16 chips, else in whole cubes."""
        if len(self.shape) == 2:
            return tuple(size == 16 for size in self.shape)
        cubes = all(size % 4 == 0 for size in self.shape)
        return tuple(cubes for _ in self.shape)

    def __str__(self) -> str:
        if self.family == "cpu":
            return f"{self.name}: {self.chips} fake CPU devices"
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{self.name}: {self.chips} {self.family} chips, {slices}{'x'.join(map(str, self.shape))}"


def parse(name: str) -> Topology:
    """The topology of a name. Raises ConfigError with the nearest sizes that exist."""
    match = _NAME.fullmatch(name)
    family = match["family"] if match else ""
    family = _ALIASES.get(family, family)
    if match is None or (family != "cpu" and family not in FAMILIES):
        raise ConfigError(
            f"--topology={name}: write FAMILY-SIZE, e.g. v5e-256, v5p:4x4x8, 2xv6e-256 or cpu-8; the families are "
            f"{', '.join(FAMILIES)} and cpu"
        )
    slices = int(match["slices"] or 1)
    if family == "cpu":
        count = math.prod(map(int, (match["number"] or match["shape"]).split("x")))
        if count * slices == 0:
            raise ConfigError(f"--topology={name} has no device; e.g. cpu-8")
        return Topology(name, family, (slices * count,))
    if slices == 0:
        raise ConfigError(f"--topology={name} has no slice; e.g. 2x{name.partition('x')[2]}")
    if match["shape"]:
        shape = tuple(map(int, match["shape"].split("x")))
        if not _exists(FAMILIES[family], shape):
            raise ConfigError(f"--topology={name}: there is no such slice; {_nearest(family, math.prod(shape))}")
        return Topology(name, family, shape, slices)
    chips = int(match["number"]) / (2 if FAMILIES[family].cores_named else 1)
    found = _shape_of(FAMILIES[family], chips)
    if found is None:
        raise ConfigError(f"--topology={name}: there is no such slice; {_nearest(family, chips)}")
    return Topology(name, family, found, slices)


def shapes(family: Family) -> Iterator[tuple[int, ...]]:
    """Every slice that can be had, its dimensions in rising order: the small ones, then whole cubes."""
    yield from SMALL[family.torus]
    if family.torus == 3:
        a_, b_, c_ = (range(4, largest + 1, 4) for largest in family.largest)
        yield from ((a, b, c) for a in a_ for b in b_ for c in c_ if a <= b <= c)


def _exists(family: Family, shape: tuple[int, ...]) -> bool:
    return tuple(sorted(shape)) in {tuple(sorted(known)) for known in shapes(family)}


def _shape_of(family: Family, chips: float) -> tuple[int, ...] | None:
    """The slice of so many chips; of several shapes the one nearest to a cube, which Google's short names mean."""
    fitting = [shape for shape in shapes(family) if math.prod(shape) == chips]
    return min(fitting, key=sum, default=None)


def _nearest(family: str, chips: float) -> str:
    """`the nearest are v5e-128 (8x16) and v5e-256 (16x16)`."""
    facts = FAMILIES[family]
    sizes = sorted({math.prod(shape) for shape in shapes(facts)})
    below = [size for size in sizes if size <= chips][-1:]
    above = [size for size in sizes if size > chips][:1]
    named = [
        f"{family}-{size * (2 if facts.cores_named else 1)} ({'x'.join(map(str, _shape_of(facts, size) or ()))})"
        for size in below + above
    ]
    return f"the nearest {'is' if len(named) == 1 else 'are'} {' and '.join(named)}"


# Devices ----------------------------------------------------------------------------------------------------------


def prepare_process(topology: Topology) -> None:
    """Set what JAX reads when it starts: call it before JAX has looked for devices.

    Planning runs on the CPU, whatever else the machine has, and libtpu must not ask a metadata server who it is.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    if topology.family == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.devices)
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-256",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # no TPU is used that others could need
    }.items():
        os.environ.setdefault(name, value)


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for. Raises ConfigError where libtpu is not installed or does not know the topology."""
    import jax
    from jax.experimental import topologies

    if topology.family == "cpu":
        found = jax.devices("cpu")
        if len(found) < topology.devices:
            raise ConfigError(
                f"--topology={topology.name}: JAX has started with {len(found)} CPU device(s); plan in a new process"
            )
        return found[: topology.devices]
    family = FAMILIES[topology.family]
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    options["chip_config_name"] = "megacore" if family.megacore else "default"
    options["wrap"] = (*topology.wraps, False)[:3]
    options["chips_per_host_bounds"] = (1, 1, 1) if topology.shape == (1, 1) else (2, 2, 1)
    try:
        return topologies.get_topology_desc(
            f"{family.libtpu}:{'x'.join(map(str, topology.shape))}", platform="tpu", **options
        ).devices
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ConfigError(
                f"--topology={topology.name} needs libtpu, which compiles without a TPU: pip install 'lmjax[tpu]'; "
                "--topology=cpu-8 works without it"
            ) from None
        raise ConfigError(f"--topology={topology.name}: the installed libtpu refuses it: {error}") from None
