"""The train step, compiled for a topology that is not here, and what it needs there."""

import time
from typing import Any, NamedTuple

import jax

from lmjax.config import Config
from lmjax.data.batch import Batch
from lmjax.devices import chips, place
from lmjax.devices.chips import Chip
from lmjax.devices.mesh import LAYOUTS
from lmjax.errors import ConfigError
from lmjax.models import architectures
from lmjax.models.flops import Flops
from lmjax.models.model import Model
from lmjax.plan import memory, roofline
from lmjax.plan.collectives import Collective, collectives
from lmjax.plan.memory import Buffer, Memory
from lmjax.plan.roofline import Estimate, Work
from lmjax.plan.topology import Topology
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.run.assemble import Experiment
from lmjax.train.accounting import Cost
from lmjax.train.state import TrainState
from lmjax.weights import Counts, count


class Compiled(NamedTuple):
    """What only the compiled program tells."""

    collectives: list[Collective]
    network_seconds: float | None
    """Seconds that all collectives take one after another; None where the chip's bandwidth is not known."""
    xla_flops: float
    """FLOPs of one device as XLA counts them: a loop's body once, nothing inside kernels."""


class Plan(NamedTuple):
    cfg: Config
    topology: Topology
    chip: Chip | None
    """None for CPUs, of which we know no limits."""
    mesh: dict[str, int]
    counts: Counts
    step_flops: Flops
    """FLOPs of one step on all devices, counted from the declaration."""
    memory: Memory
    needed: float
    """Bytes on one device; a lower bound when the step was not compiled."""
    largest: list[Buffer]
    work: Work | None
    compiled: Compiled | None
    """None when the step does not fit."""
    seconds: dict[str, float]
    """Wall time of tracing and compiling."""

    @property
    def limit(self) -> float | None:
        return None if self.chip is None else self.chip.hbm

    @property
    def fits(self) -> bool:
        return self.compiled is not None and (self.limit is None or self.needed <= self.limit)

    @property
    def estimate(self) -> Estimate | None:
        """Seconds of a step; None where the chip's figures, or the program, are missing."""
        if self.chip is None or self.work is None or self.compiled is None:
            return None
        network = self.compiled.network_seconds
        return None if network is None else roofline.estimate(self.chip, self.work, network)


def make_plan(cfg: Config, topology: Topology, devices: list[Any]) -> Plan:
    """Compile the step of a config, its vocabulary known, for `devices`.

    A step whose state and gradients alone are too much is not compiled. Raises ConfigError for a config whose mesh does
    not fit the devices, or leaves some of a TPU slice out.
    """
    experiment = assemble.assemble(without_data(cfg), devices)
    assert experiment.mesh is not None
    if topology.family != "cpu" and experiment.mesh.size < len(devices):
        raise ConfigError(
            f"mesh: {experiment.mesh.size} of the {len(devices)} devices of {topology.name} take part, but a TPU "
            f"program runs on all of them; leave mesh.{LAYOUTS[cfg.mesh.layout][0]} out, and it takes the rest"
        )
    state, batch = assemble.abstract_state(experiment), assemble.abstract_batch(experiment)
    frozen = assemble.abstract_frozen(experiment)
    cost = Cost(0, 0, 0, 0, 0).plus(cfg.train.batch, experiment.task.cost)
    plan = Plan(
        cfg=cfg,
        topology=topology,
        chip=chips.chip(devices[0].device_kind),
        mesh=dict(experiment.mesh.shape),
        counts=count(experiment.task.spec),
        step_flops=Flops(cost.flops_6nd, cost.flops_causal, cost.flops_full),
        memory=memory.of_declaration(state, frozen, batch),
        needed=assemble.device_bytes((state, state.params, frozen)),
        largest=memory.largest_arrays({"state": state, "gradients": state.params, "frozen": frozen}),
        work=None,
        compiled=None,
        seconds={},
    )
    hopeless = plan.limit is not None and plan.needed > plan.limit
    return plan if hopeless else _compiled(plan, experiment, state, batch)


def _compiled(plan: Plan, experiment: Experiment, state: TrainState, batch: Batch) -> Plan:
    """The plan with what tracing and compiling the step tell."""
    assert experiment.mesh is not None
    start = time.perf_counter()
    step = assemble.jitted_step(experiment)  # outside the mesh: nothing can run on devices that are not here
    with place.use_mesh(experiment.mesh):
        traced = step.trace(state, assemble.abstract_frozen(experiment), batch)
        lowered = traced.lower()
    traced_at, program = time.perf_counter(), traced.jaxpr.jaxpr
    visible = _visible(architectures.build(plan.cfg.model), plan.cfg.data.seq_len)
    plan = plan._replace(
        memory=plan.memory._replace(activations=memory.saved_for_backward(program)),
        work=roofline.work(program, visible=visible, state_bytes=assemble.device_bytes(state)),
        seconds={"tracing": traced_at - start},
    )
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:  # of many causes; the message alone tells which
        exhausted = memory.parse_out_of_memory(str(error), arguments=assemble.device_bytes(state))
        if exhausted is None:
            raise
        return plan._replace(needed=exhausted.used, largest=exhausted.largest or memory.largest_values(program))
    took = plan.seconds | {"compiling": time.perf_counter() - traced_at}
    found = memory.of_compiled(plan.memory, compiled)
    assert found.peak is not None
    sent, places = collectives(compiled.as_text()), [roofline.place(device) for device in experiment.mesh.devices.flat]
    facts = Compiled(
        collectives=sent,
        network_seconds=plan.chip and roofline.network_seconds(plan.chip, plan.topology, places, sent),
        xla_flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
    )
    return plan._replace(memory=found, needed=found.peak, compiled=facts, seconds=took)


def _visible(model: Model, T: int) -> float:
    """The part of all (query, key) pairs that the mask shows."""
    if model.mixing_flops is None:
        return 1.0
    return model.mixing_flops(T, causal=True) / model.mixing_flops(T, causal=False)
