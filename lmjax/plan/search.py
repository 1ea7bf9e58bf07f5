"""Which layout, remat policy and number of microbatches: `lmjax plan --search`.

A closed form says what each choice needs at least and roughly how long a step takes; what cannot fit is dropped, and
the rest compiled in that order, as far as the time goes. What the compiled programs need and send then decides.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from lmjax import chips
from lmjax import experiment as parts
from lmjax.chips import Chip
from lmjax.config import Config
from lmjax.errors import ConfigError
from lmjax.models import decoder
from lmjax.models.flops import sequence_flops
from lmjax.models.remat import REMAT
from lmjax.plan.step import Plan, make_plan
from lmjax.plan.topology import Topology
from lmjax.weights import count

MICROBATCHES = (1, 2, 4, 8)
SPLIT = {"fsdp": None, "tensor": 16}
"""Mesh axes that are searched, and their largest sizes; `data` takes the devices that they leave."""
_HALF = 2  # bytes of a bfloat16


class Candidate(NamedTuple):
    settings: dict[str, Any]
    """Changes to the config, by dotted key."""
    cfg: Config
    least_bytes: float
    """What one device holds at least: state, gradients, saved activations."""
    seconds: float
    """A rough step time, to try the promising first."""


class Search(NamedTuple):
    plans: list[tuple[Candidate, Plan]]
    """Those that fit, best first."""
    rejected: int
    """Compiled, and found not to fit."""
    candidates: int
    too_large: int
    """Dropped without compiling."""


def search(cfg: Config, topology: Topology, devices: list[Any], *, seconds: float) -> Search:
    """Compile the promising candidates for `seconds`, the last one to its end; rank those that fit by time."""
    stop = time.perf_counter() + seconds
    chip = chips.chip(devices[0].device_kind)
    limit = math.inf if chip is None or chip.hbm is None else chip.hbm
    everything = list(candidates(cfg, devices, chip))
    possible = sorted((one for one in everything if one.least_bytes <= limit), key=lambda one: one.seconds)
    plans, rejected = [], 0
    for candidate in possible:
        if time.perf_counter() > stop:
            break
        plan = make_plan(candidate.cfg, topology, devices)
        if plan.fits:
            plans.append((candidate, plan))
        else:
            rejected += 1
    plans.sort(key=lambda pair: _rank(pair[1]))
    return Search(plans, rejected, len(everything), len(everything) - len(possible))


def _rank(plan: Plan) -> tuple[float, float]:
    """By the time without overlap, which tells layouts apart even where compute bounds them all; then by memory."""
    assert plan.work is not None
    return (plan.work.flops if plan.estimate is None else plan.estimate.slowest, plan.needed)


def candidates(cfg: Config, devices: list[Any], chip: Chip | None) -> Iterator[Candidate]:
    """Every combination that the config's checks allow on so many devices."""
    divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
    sizes = [[n for n in divisors if n <= (largest or n)] for largest in SPLIT.values()]
    for split in itertools.product(*sizes):
        if len(devices) % math.prod(split):
            continue
        mesh = {"mesh.layout": "dp"} | {f"mesh.{axis}": size for axis, size in zip(SPLIT, split, strict=True)}
        for microbatches in MICROBATCHES:
            try:
                changed = changed_config(cfg, mesh | {"train.microbatches": microbatches})
                experiment = parts.assemble(changed, devices)
                state = parts.abstract_state(experiment)
            except ConfigError:
                continue
            fixed = parts.device_bytes(state) + parts.device_bytes(state.params)
            for remat in REMAT:
                settings = mesh | {"train.microbatches": microbatches, "model.remat": remat}
                one, by_axis = changed_config(cfg, settings), dict(zip(SPLIT, split, strict=True))
                least = fixed + saved_activations(one, by_axis, len(devices))
                yield Candidate(settings, one, least, rough_seconds(one, by_axis, len(devices), chip))


def changed_config(cfg: Config, settings: dict[str, Any]) -> Config:
    """The config with dotted keys `part.field` set. Raises ConfigError for what its checks refuse."""
    for key, value in settings.items():
        part, field = key.split(".")
        cfg = dataclasses.replace(cfg, **{part: dataclasses.replace(getattr(cfg, part), **{field: value})})
    return cfg


def saved_activations(cfg: Config, split: dict[str, int], devices: int) -> float:
    """Bytes that the backward pass of one microbatch finds saved on one device, at the least.

    `full` keeps each layer's input, the other policies at least the outputs of its matmuls, too.
    """
    dims = cfg.model.dims
    tokens = cfg.train.batch * cfg.data.seq_len / cfg.train.microbatches / (devices // split["tensor"])
    kept = float(dims["embed"])
    if cfg.model.remat != "full":
        heads = (dims["heads"] + 2 * dims["kv_heads"]) * dims["head_dim"]
        kept += (heads + dims["mlp"] * (2 if cfg.model.gated else 1)) / split["tensor"]
    return tokens * cfg.model.layers * kept * (_HALF if cfg.model.dtype == "bfloat16" else 4)


def rough_seconds(cfg: Config, split: dict[str, int], devices: int, chip: Chip | None) -> float:
    """Compute and network time of a step, one after the other, by the rules of thumb of the JAX scaling book.

    Weights are gathered forward and backward and their gradients scattered, for every microbatch; over `tensor` each
    layer gathers and scatters its activations twice per pass. Where the chip is unknown the figures are a TPU v5e's.
    """
    chip = chip if chip is not None and chip.link is not None else chips.CHIPS["TPU v5 lite"]
    assert chip.link is not None
    model = decoder.build(cfg.model)
    passes = 4 if cfg.model.remat == "full" else 3
    flops = sequence_flops(model, cfg.data.seq_len).causal * cfg.train.batch / devices * passes / 3
    copies = devices // (split["fsdp"] * split["tensor"])
    weights = _HALF * count(model.spec).total / split["tensor"]
    sent = 3 * weights * (split["fsdp"] - 1) / split["fsdp"] * cfg.train.microbatches
    sent += 2 * weights / split["fsdp"] * (copies - 1) / copies
    x_bytes = _HALF * cfg.train.batch * cfg.data.seq_len / (devices // split["tensor"]) * cfg.model.embed
    sent += 4 * passes / 2 * cfg.model.layers * x_bytes * (split["tensor"] - 1) / split["tensor"]
    return flops / chip.flops + sent / (2 * chip.link)
