"""Which layout, remat policy and number of microbatches: `lmjax plan --search`.

A closed form says what each choice needs at least and roughly how long a step takes; what cannot fit is dropped, and
the rest compiled in that order, as far as the time goes. What the compiled programs need and send then decides.
"""

import dataclasses
import itertools
import math
import operator
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from lmjax.config import Config
from lmjax.devices import chips
from lmjax.devices.chips import Chip
from lmjax.devices.config import MeshConfig
from lmjax.devices.mesh import AXES, LAYOUTS, axis_sizes
from lmjax.errors import ConfigError
from lmjax.models import architectures
from lmjax.models.flops import sequence_flops
from lmjax.models.remat import REMAT
from lmjax.plan.step import Plan, make_plan
from lmjax.plan.topology import Topology
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.schema import validated
from lmjax.weights import count

SEARCHED = (*(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)), "train.microbatches", "model.remat")
MICROBATCHES = (1, 2, 4, 8)  # for each pipeline stage
LARGEST = {"tensor": 16, "context": 16, "pipeline": 16}
"""The largest sizes of mesh axes that leave each device too little to do beyond."""
_HALF = 2  # bytes of a bfloat16


class Candidate(NamedTuple):
    cfg: Config
    fixed_bytes: float
    """Bytes of state and gradients on one device."""
    saved_bytes: float
    """What the backward pass of one microbatch finds saved there, at the least."""
    seconds: float
    """A rough step time, to try the promising first."""


class Search(NamedTuple):
    cfg: Config
    """What was asked for, which the plans vary."""
    plans: list[Plan]
    """The plans that fit, best first."""
    rejected: int
    """Compiled, and found not to fit."""
    refused: Counter[str]
    """Why only tracing, or XLA, told that some cannot be compiled, and how many."""
    candidates: int
    too_large: int
    """Dropped without compiling."""


def search(cfg: Config, topology: Topology, devices: list[Any], *, seconds: float) -> Search:
    """Compile the promising candidates for `seconds`, the last one to its end; rank those that fit by time.

    The closed form is a bound from below. By which factor those already compiled needed more than saved activations is
    taken to hold for all of their remat policy, the least of them: not every layout has to fail by itself.
    Raises ConfigError when the config's checks leave nothing to try.
    """
    stop = time.perf_counter() + seconds
    chip = chips.chip(devices[0].device_kind)
    limit = math.inf if chip is None or chip.hbm is None else chip.hbm
    everything = sorted(candidates(cfg, topology, devices), key=lambda one: one.seconds)
    if not everything:
        raise ConfigError(
            f"--topology={topology.name}: no layout passes the config's checks on {len(devices)} device(s); change "
            f"train.batch={cfg.train.batch}, or the sizes that are set of mesh.*"
        )
    plans, refused, rejected, too_large = [], Counter[str](), 0, 0
    factor: dict[str, float] = {}
    for candidate in everything:
        remat = candidate.cfg.model.remat
        if candidate.fixed_bytes + candidate.saved_bytes * factor.get(remat, 1) > limit:
            too_large += 1
        elif time.perf_counter() <= stop:
            try:
                plan = make_plan(candidate.cfg, topology, devices)
            except (ConfigError, jax.errors.JaxRuntimeError) as error:  # such as an attention that cannot share rows
                refused[next(iter(str(error).splitlines()), "")] += 1
                continue
            found = max((plan.needed - candidate.fixed_bytes) / candidate.saved_bytes, 1)
            factor[remat] = min(factor.get(remat, math.inf), found)
            if plan.fits:
                plans.append(plan)
            else:
                rejected += 1
    return Search(cfg, sorted(plans, key=_rank), rejected, refused, len(everything), too_large)


def _rank(plan: Plan) -> tuple[float, float]:
    """Rank by the time without overlap, which tells layouts apart even if compute bounds them all, then by memory."""
    assert plan.work is not None
    return (plan.work.flops if plan.estimate is None else plan.estimate.slowest, plan.needed)


def changes(old: Config, new: Config) -> dict[str, Any]:
    """What a candidate changes, by dotted key."""
    values = {key: (operator.attrgetter(key)(old), operator.attrgetter(key)(new)) for key in SEARCHED}
    return {key: after for key, (before, after) in values.items() if after != before}


def candidates(cfg: Config, topology: Topology, devices: list[Any]) -> Iterator[Candidate]:
    """Every combination of layout, microbatches and remat policy that the config's checks allow on so many devices.

    Sizes of mesh axes that the config sets are kept.
    """
    chip = chips.chip(devices[0].device_kind)
    across = topology.slices if topology.slices > 1 else None
    given = dataclasses.replace(cfg.mesh, slices=cfg.mesh.slices or across)
    for sizes, mesh in meshes(len(devices), given):
        try:
            fixed = _state_bytes(_with(cfg, mesh, sizes["pipeline"], cfg.model.remat), devices)
        except ConfigError:
            continue
        for pieces, remat in itertools.product(MICROBATCHES, REMAT):
            try:
                one = _with(cfg, mesh, pieces * sizes["pipeline"], remat)
                assemble.make_mesh(one, devices)
            except ConfigError:
                continue
            yield Candidate(one, fixed, saved_activations(one, len(devices)), rough_seconds(one, sizes, chip))


def _with(cfg: Config, mesh: MeshConfig, microbatches: int, remat: str) -> Config:
    """The config with these changes, checked again. Raises ConfigError, as `dataclasses.replace` would not."""
    train = dataclasses.replace(cfg.train, microbatches=microbatches)
    model = dataclasses.replace(cfg.model, remat=remat)
    return validated(Config, vars(cfg) | {"mesh": mesh, "train": train, "model": model})


def meshes(devices: int, given: MeshConfig) -> Iterator[tuple[dict[str, int], MeshConfig]]:
    """The layouts by name, with every size of those axes that do not take what the others leave; no mesh twice.

    Sizes that are given stay as they are, in every layout. No device is left out.
    """
    seen: list[dict[str, int]] = []
    divisors = [n for n in range(2, devices + 1) if devices % n == 0]
    fixed = {axis: getattr(given, axis) for axis in AXES if getattr(given, axis) is not None}
    for name, (rest, *others) in LAYOUTS.items():
        free = [axis for axis in others if axis not in fixed]
        choices = [[n for n in divisors if n <= LARGEST.get(axis, n)] for axis in free]
        for chosen in itertools.product(*choices):
            mesh = MeshConfig(layout=name, **fixed, **dict(zip(free, chosen, strict=True)))
            taken = math.prod((*fixed.values(), *chosen))
            if taken == devices or (devices % taken == 0 and rest not in fixed):
                sizes = axis_sizes(mesh, devices)
                if sizes not in seen:
                    seen.append(sizes)
                    yield sizes, mesh


def _state_bytes(cfg: Config, devices: list[Any]) -> float:
    """Bytes of state and gradients on one device. Raises ConfigError for what the mesh does not divide."""
    state = assemble.abstract_state(assemble.assemble(without_data(cfg), devices))
    return assemble.device_bytes((state, state.params))


def saved_activations(cfg: Config, devices: int) -> float:
    """Bytes that the backward pass of one microbatch finds saved on one device, at the least.

    `full` keeps each layer's input, the other policies at least the outputs of its matmuls, too. At best all devices
    share them.
    """
    dims = cfg.model.dims
    kept = dims["embed"]
    if cfg.model.remat != "full":
        kept += (dims["heads"] + 2 * dims["kv_heads"]) * dims["head_dim"] + dims["mlp"] * (2 if cfg.model.gated else 1)
    tokens = cfg.train.batch * cfg.data.seq_len / cfg.train.microbatches
    return tokens / devices * cfg.model.layers * kept * (_HALF if cfg.model.dtype == "bfloat16" else 4)


def rough_seconds(cfg: Config, sizes: dict[str, int], chip: Chip | None) -> float:
    """Compute and network time of a step, one after the other, by the rules of thumb of the JAX scaling book.

    For every microbatch, weights are gathered forward and backward, and their gradients scattered and added up over
    copies. Over `tensor` each layer gathers and scatters its activations twice per pass; over `context` each pass
    sends keys and values round. Stages of a pipeline compute everything again, and wait while it fills. Where the chip
    is unknown the figures are a TPU v5e's.
    """
    chip = chip if chip is not None and chip.link is not None else chips.CHIPS["TPU v5 lite"]
    assert chip.link is not None
    devices, tensor, context = math.prod(sizes.values()), sizes["tensor"], sizes["context"]
    sharing, stages = sizes["fsdp"] * context, sizes["pipeline"]
    copies = devices // (sharing * stages * tensor)
    model, dims = architectures.build(cfg.model), cfg.model.dims
    passes = 3 + (cfg.model.remat == "full") + (stages > 1)  # forward, backward, which costs two, and again
    compute = sequence_flops(model, cfg.data.seq_len).causal * cfg.train.batch / devices * passes / 3 / chip.flops
    compute *= 1 + (stages - 1) / cfg.train.microbatches

    weights = _HALF * count(model.spec).total / (tensor * stages) * cfg.train.microbatches
    sent = 3 * weights * _others(sharing) + 2 * weights / sharing * _others(copies)
    tokens = _HALF * cfg.train.batch * cfg.data.seq_len * cfg.model.layers / devices
    sent += 2 * passes * tokens * dims["embed"] * tensor * _others(tensor)
    sent += passes * tokens * 2 * dims["kv_heads"] * dims["head_dim"] * (context - 1)
    return compute + sent / (2 * chip.link)


def _others(devices: int) -> float:
    """The part of an array that a device of a ring does not hold itself."""
    return (devices - 1) / devices
