"""Plans beside what eight devices really hold and send. test_plan.py runs this file in a process of its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmjax.config import Config, parse
from lmjax.devices import place
from lmjax.errors import ConfigError
from lmjax.plan import roofline, step, topology
from lmjax.plan.collectives import Collective, by_kind, collectives
from lmjax.run import assemble
from lmjax.tasks.pretrain import without_data
from lmjax.weights import count

pytestmark = pytest.mark.usefixtures("quick_compilation")

EMBED, LAYERS, VOCAB, BATCH, T = 32, 3, 64, 16, 16
OTHERS = 7 / 8  # of an array that eight devices share, what one of them does not hold


def config(**mesh: Any) -> Config:
    """Untied and float32: then every weight is gathered or summed by itself, as 4 bytes."""
    return parse(
        {
            "model": {"vocab": VOCAB, "layers": LAYERS, "embed": EMBED, "heads": 4, "kv_heads": 2, "mlp": 64}
            | {"context": T, "remat": "full", "tied": False},
            "data": {"seq_len": T},
            "train": {"batch": BATCH, "steps": 10},
            "optimizer": {"schedule": {"warmup": 5}},
            "mesh": mesh,
        }
    )


def plan_of(cfg: Config) -> step.Plan:
    target = topology.parse("cpu-8")
    return step.make_plan(cfg, target, topology.devices(target))


def held(tree: Any) -> int:
    """Bytes of a real state on the first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def fsdp() -> step.Plan:
    return plan_of(config(layout="fsdp"))


def test_memory_is_what_a_state_takes(fsdp: step.Plan) -> None:
    state = assemble.initial_state(assemble.assemble(without_data(fsdp.cfg), jax.devices()))
    memory = fsdp.memory
    assert memory.padding is not None and memory.temporaries is not None
    assert (memory.params, memory.optimizer) == (held(state.params), held(state.opt_state))
    assert memory.params == 4 * fsdp.counts.total / 8, "every weight is split"
    assert abs(memory.padding) <= 8  # but for a scalar that the step does not read, XLA counts the same
    assert fsdp.needed >= memory.params + memory.optimizer + memory.temporaries > 0


def test_activations_are_the_inputs_of_the_layers(fsdp: step.Plan) -> None:
    """And the gradient of what leaves the last, which the loss takes while it has the logits."""
    assert fsdp.memory.activations == (LAYERS + 1) * BATCH // 8 * T * EMBED * 4


def test_no_remat_policy_saves_gathered_weights() -> None:
    def saved(layout: str) -> float:
        cfg = config(layout=layout)
        return plan_of(replace(cfg, model=replace(cfg.model, remat="none"))).memory.activations

    assert saved("fsdp") == saved("dp")


def test_fsdp_gathers_weights_for_each_pass(fsdp: step.Plan) -> None:
    """Layers forward and again backward; the tables and the last norm once."""
    assert fsdp.compiled is not None
    sent, total = by_kind(fsdp.compiled.collectives), fsdp.counts.total
    once = 2 * VOCAB * EMBED + EMBED
    assert sent["all-gather"] == OTHERS * 4 * (2 * (total - once) + once)
    assert sent["all-to-all"] == sent["collective-permute"] == 0
    norms = (2 * LAYERS + 1) * EMBED
    assert sent["reduce-scatter"] == OTHERS * 4 * (total - norms)
    assert 0 <= sent["all-reduce"] - 2 * OTHERS * 4 * norms < 200  # metrics


@pytest.mark.parametrize(("devices", "window"), [(2, None), (4, None), (8, None), (8, 3), (8, 1), (4, 16)])
def test_a_ring_computes_what_its_busiest_device_does(devices: int, window: int | None) -> None:
    """All pairs of its own tokens, and half of all with each device whose keys are near: here by plain loops.

    The closed form counts 6 products per pair, forward and backward; a ring computes the scores once more, and dy . y.
    """
    cfg = config(layout="fsdp+cp", context=devices)
    local = {"pattern": ("local",), "window": window} if window else {}
    alone = replace(cfg, model=replace(cfg.model, remat="none", **local))
    experiment = assemble.assemble(without_data(alone), jax.devices())
    with place.use_mesh(experiment.mesh):
        arguments = assemble.abstract_state(experiment), {}, assemble.abstract_batch(experiment)
        program = assemble.jitted_step(experiment).trace(*arguments).jaxpr.jaxpr
    own, busiest = T // devices, 0.0
    for me in range(devices):
        others = [you for you in range(devices) if you != me and sees_any(me, you, T // (2 * devices), devices, window)]
        busiest = max(busiest, own * own * (1 + len(others) / 2))
    counts, flops = count(experiment.task.spec), experiment.task.cost
    matmuls, full = (BATCH / 8 * n for n in (6 * counts.matmul * T, flops.flops_full))
    executed = roofline.work(program, visible=1.0, state_bytes=0.0).flops
    assert executed == matmuls + 2 * (BATCH * devices // 8) * LAYERS * EMBED * (7 * busiest + own)
    if window is None:
        dots = 2 * BATCH // 8 * LAYERS * EMBED * T
        assert executed == pytest.approx(matmuls + 7 / 6 * (full - matmuls) * (devices + 1) / (2 * devices) + dots)


def sees_any(me: int, you: int, chunk: int, devices: int, window: int | None) -> bool:
    """Whether a query of one device sees a key of another, which have an early and a late chunk each."""

    def places(device: int) -> list[int]:
        return [chunk * part + i for part in (device, 2 * devices - 1 - device) for i in range(chunk)]

    return any(0 <= t - s < (window or T) for t in places(me) for s in places(you))


def test_data_parallel_sums_gradients() -> None:
    plan = plan_of(config(layout="dp"))
    assert plan.compiled is not None
    sent = by_kind(plan.compiled.collectives)
    gradients = 2 * OTHERS * 4 * plan.counts.total
    assert 0 <= sent.pop("all-reduce") - gradients < 200  # metrics
    assert not any(sent.values())


def test_loops_send_as_often_as_they_say_else_once() -> None:
    """What the data decides about: a sum in each round, and one in the condition."""

    def sent(loop: Callable[[jax.Array], jax.Array]) -> list[Collective]:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
        with jax.set_mesh(mesh):
            x = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
            return collectives(jax.jit(loop).lower(x).compile().as_text())

    def body(x: jax.Array) -> jax.Array:
        return x / x.sum()

    assert [one.times for one in sent(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: body(x), x))] == [5]
    assert [one.times for one in sent(lambda x: jax.lax.while_loop(lambda x: x.sum() > 1.5, body, x))] == [1, 1]
    assert [one.times for one in sent(lambda x: jax.lax.while_loop(lambda x: (x > 1).sum() > 0, body, x))] == [1, 1]


def test_a_mesh_smaller_than_a_slice_is_refused() -> None:
    """CPUs stand for the chips: nothing is compiled."""
    cfg = config(layout="dp+fsdp", data=2)
    with pytest.raises(ConfigError, match=r"4 of the 8 devices of v5e-8 take part.*leave mesh\.data out"):
        step.make_plan(cfg, topology.parse("v5e-8"), jax.devices())
