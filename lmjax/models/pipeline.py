"""Pipeline parallelism: stages hold consecutive layers, and microbatches flow through them.

With P stages and m microbatches (Huang et al. 2019, arXiv:1811.06965), each cell naming the microbatch that a stage
works on:

    tick       0   1   2   3   4   5      m + P - 1 ticks, P - 1 of which a stage has nothing useful to do:
    stage 0    0   1   2   3   .   .      (P - 1) / (m + P - 1) of its time, the bubble
    stage 1    .   0   1   2   3   .
    stage 2    .   .   0   1   2   3

The backward pass is the same flow of gradients, from the last stage to the first. A stage keeps the input of every
tick, computes its layers again from it, and adds up the gradients of its weights: the loop over microbatches is that of
gradient accumulation.

Before and after these layers stages share the rows of a batch as other devices do, so no stage has the embedding or the
head to itself. The store of a stage begins with m / P microbatches and ends with what became of them. All stores form
one queue, which moves up one place a tick: what leaves it enters the first stage, what leaves the last stage joins it.
docs/pipeline.md says when to choose it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmjax.devices.gather import per_stage
from lmjax.devices.mesh import SHARDING_RULES, mesh_axes, reshape, shards
from lmjax.devices.rows import join_rows, split_rows
from lmjax.weights import Params

(AXIS,) = SHARDING_RULES["layers"]

Stage = Callable[[Any, jax.Array, Params, Any], tuple[jax.Array, Any]]
"""(layer_inputs, x_BTD, layers, number of the first one) -> (x_BTD, metrics of every layer)"""


class Schedule(NamedTuple):
    stages: int
    microbatches: int

    @property
    def share(self) -> int:
        """Microbatches in each stage's store."""
        return self.microbatches // self.stages

    @property
    def ticks(self) -> int:
        return self.microbatches + self.stages - 1

    @property
    def bubble(self) -> float:
        """The fraction of its time in which a stage has no microbatch to work on."""
        return (self.stages - 1) / self.ticks


def pipelined(
    stage: Stage, layer_inputs: Any, x_BTD: jax.Array, layers: Params, microbatches: int | None = None
) -> tuple[jax.Array, Any]:
    """`stage(layer_inputs, x_BTD, layers, 0)`, where the layers' first axis is sharded along the pipeline's stages.

    `microbatches` is a multiple of the stages (default: one each). Arrays of `layer_inputs` have a row for each of x,
    or a single one for all, or are scalars. Metrics are sums: those of microbatches are added up.
    """
    stages, B = shards("layers"), x_BTD.shape[0]
    schedule = Schedule(stages, microbatches or stages)
    assert schedule.microbatches % stages == 0 and B % schedule.microbatches == 0, (B, schedule)
    layer_inputs = jax.tree.map(lambda c: c if _for_all_rows(c) else _for_all_stages(schedule, c), layer_inputs)

    @jax.custom_vjp
    def run(layers: Params, x_BTD: jax.Array, layer_inputs: Any) -> tuple[jax.Array, Any]:
        return _forward(stage, schedule, layers, x_BTD, layer_inputs)[0]

    run.defvjp(functools.partial(_forward, stage, schedule), functools.partial(_backward, stage, schedule))
    return run(layers, x_BTD, layer_inputs)


def _for_all_stages(schedule: Schedule, x: jax.Array) -> jax.Array:
    """[B, ...] -> [m, B / m, ...], the microbatches of all stages on each."""
    rows = mesh_axes("microbatch")
    rest = jax.typeof(x).sharding.spec[1:]
    split = (schedule.stages, x.shape[0] // schedule.microbatches, schedule.share)
    x = reshape(x, (*split, *x.shape[1:]), (AXIS, rows, None, *rest)).swapaxes(1, 2)
    x = jax.sharding.reshard(x, PartitionSpec(None, None, tuple(rows) or None, *rest))
    return reshape(x, (schedule.microbatches, *x.shape[2:]), (None, rows, *rest))


def _for_all_rows(c: jax.Array) -> bool:
    return jnp.ndim(c) == 0 or len(c) == 1


def _at(layer_inputs: Any, microbatch: jax.Array) -> Any:
    return jax.tree.map(lambda c: c if _for_all_rows(c) else c[microbatch], layer_inputs)


# Forward and backward ---------------------------------------------------------------------------------------------


def _forward(stage: Stage, schedule: Schedule, layers: Params, x_BTD: jax.Array, layer_inputs: Any) -> tuple[Any, Any]:
    def local(layers: Params, x_BTD: jax.Array, layer_inputs: Any) -> tuple[jax.Array, Any, jax.Array]:
        first = jax.lax.axis_index(AXIS) * len(jax.tree.leaves(layers)[0])

        def work(x_BTD: jax.Array, microbatch: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
            y_BTD, metrics = stage(_at(layer_inputs, microbatch), x_BTD, layers, first)
            return y_BTD, metrics, x_BTD

        return _flow(schedule, work, x_BTD)

    spec = jax.typeof(x_BTD).sharding.spec
    kept_spec = PartitionSpec(AXIS, mesh_axes("microbatch") or None, *spec[1:])
    y_BTD, metrics, kept = per_stage(local, (spec, PartitionSpec(AXIS), kept_spec))(layers, x_BTD, layer_inputs)
    return (y_BTD, metrics), (layers, kept, layer_inputs)


def _backward(stage: Stage, schedule: Schedule, saved: Any, gradients: Any) -> tuple[Params, jax.Array, None]:
    def local(layers: Params, kept: jax.Array, layer_inputs: Any, dy_BTD: jax.Array, dmetrics: Any) -> Any:
        number = jax.lax.axis_index(AXIS)
        first = number * len(jax.tree.leaves(layers)[0])

        def work(dy_BTD: jax.Array, microbatch: jax.Array) -> tuple[jax.Array, Params, None]:
            def run(layers: Params, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
                return stage(_at(layer_inputs, microbatch), x_BTD, layers, first)

            _, vjp = jax.vjp(run, layers, kept[microbatch + number])
            dlayers, dx_BTD = vjp((dy_BTD, dmetrics))
            return dx_BTD, dlayers, None

        dx_BTD, dlayers, _ = _flow(schedule, work, dy_BTD, upstream=True)
        return dlayers, dx_BTD

    layers, kept, layer_inputs = saved
    dy_BTD, dmetrics = gradients
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (layers, dy_BTD))
    return *per_stage(local, specs)(layers, kept, layer_inputs, dy_BTD, dmetrics), None


# The flow ---------------------------------------------------------------------------------------------------------


def _flow(
    schedule: Schedule, work: Callable[..., Any], x_BTD: jax.Array, *, upstream: bool = False
) -> tuple[jax.Array, Any, Any]:
    """Run on each stage: every microbatch of every store passes through `work` of one stage after another.

    `work(x, microbatch) -> (x, more, kept)`. Returns the store afterwards, the sum of `more` over microbatches, and
    `kept` of every tick. Upstream, from the last stage to the first, the last store's microbatches come first.
    """
    stages, microbatches = schedule
    place = jax.lax.axis_index(AXIS)
    onward, back = [(i, i + 1) for i in range(stages - 1)], [(i + 1, i) for i in range(stages - 1)]
    if upstream:
        place, onward, back = stages - 1 - place, back, onward

    def tick(carry: Any, t: jax.Array) -> tuple[Any, Any]:
        x_BTD, store, total = carry
        turn, entry = t - place, t % schedule.share
        oldest = store[entry]
        x_BTD = jnp.where(place == 0, oldest, x_BTD)
        block, number = jnp.divmod(jnp.clip(turn, 0, microbatches - 1), schedule.share)
        block = stages - 1 - block if upstream else block
        x_BTD, more, kept = work(x_BTD, block * schedule.share + number)
        # While the pipeline fills and empties, a stage works on arbitrary values, and the result is not used.
        useful = (turn >= 0) & (turn < microbatches)
        total = jax.tree.map(lambda sum, x: jnp.where(useful, sum + x, sum), total, more)
        newest = jnp.where(place == stages - 1, x_BTD, jax.lax.ppermute(oldest, AXIS, back))
        return (jax.lax.ppermute(x_BTD, AXIS, onward), store.at[entry].set(newest), total), kept

    store = split_rows(x_BTD, schedule.share)
    _, more, _ = jax.eval_shape(work, store[0], place)
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), more)
    (_, store, total), kept = jax.lax.scan(tick, (store[0], store, total), jnp.arange(schedule.ticks))
    return join_rows(jnp.roll(store, 1 - stages, axis=0)), total, kept
