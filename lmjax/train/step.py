"""The one train step: gradient, finite gate, update. Everything it does not need to know is an argument."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmjax.data.batch import Batch
from lmjax.devices.mesh import shards
from lmjax.devices.rows import split_rows
from lmjax.metrics import Metrics
from lmjax.optim.optimizers import Optimizer
from lmjax.train.objective import Keys, Objective
from lmjax.train.state import Counters, TrainState
from lmjax.weights import Params

Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


def make_step(objective: Objective, optimizer: Optimizer, *, microbatches: int = 1) -> Step:
    """(state, frozen, batch) -> (next state, metrics). Jit it with the state donated.

    The gradient is that of the loss sum over the whole batch divided by the weight of the whole batch, so cutting the
    batch into microbatches changes nothing but memory, however unevenly the weights are spread. An update whose loss
    or gradient is not finite is left out and counted; parameters and optimizer state then stay as they were.
    """

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        keys_B = sample_keys(state.hyper["seed"], batch.ids_B)
        gradients, metrics, buffers = accumulate(objective, state, frozen, batch, keys_B, microbatches)
        norm = optax.tree.norm(gradients)
        loss_sum, _ = metrics["loss"]
        finite = jnp.isfinite(norm) & jnp.isfinite(loss_sum)

        updates, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, state.hyper, state.counters.step, norm
        )
        params, metrics = objective.settle(optax.apply_updates(state.params, updates), metrics)
        params, opt_state, buffers = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, buffers),
            (state.params, state.opt_state, state.buffers),
        )
        one = jnp.ones(())
        metrics |= {
            "grad_norm": (norm, one),
            "lr": (optimizer.learning_rate(state.counters.step, state.hyper), one),
            "skipped": ((~finite).astype(jnp.float32), one),
        }
        counters = count_step(state.counters, finite)
        return TrainState(params, opt_state, state.hyper, buffers, counters), metrics

    return step


def sample_keys(seed: jax.Array, ids_B: jax.Array) -> jax.Array:
    """One key per sample, named by the run's seed and the sample's global index."""
    return jax.vmap(lambda sample: jax.random.fold_in(jax.random.key(seed), sample))(ids_B)


def accumulate(
    objective: Objective, state: TrainState, frozen: Params, batch: Batch, keys_B: Keys, microbatches: int
) -> tuple[Params, Metrics, Any]:
    """The gradient of (loss sum / batch weight), the metrics and the new buffers."""
    scale = jax.tree.map(lambda weight: 1 / jnp.where(weight > 0, weight, 1), objective.weight(batch))

    def gradient(buffers: Any, batch: Batch, keys_B: Keys) -> tuple[Params, Metrics, Any]:
        def loss(params: Params) -> tuple[jax.Array, Any]:
            loss_sum, metrics, new_buffers = objective.loss(params, frozen, buffers, batch, keys_B)
            terms = jax.tree.map(jnp.multiply, loss_sum, scale)
            return optax.tree.sum(terms), (metrics, new_buffers)

        gradients, (metrics, new_buffers) = jax.grad(loss, has_aux=True)(state.params)
        return gradients, metrics, new_buffers

    if microbatches == 1 or shards("layers") > 1:  # a pipeline has its own loop over microbatches
        return gradient(state.buffers, batch, keys_B)

    def body(carry: Any, inputs: Any) -> tuple[Any, None]:
        sums, buffers = carry
        *more, buffers = gradient(buffers, *inputs)
        return (jax.tree.map(jnp.add, sums, more), buffers), None

    pieces = jax.tree.map(lambda x: split_rows(x, microbatches), (batch, keys_B))
    one_piece = jax.tree.map(lambda x: x[0], pieces)
    *sums, _ = jax.eval_shape(gradient, state.buffers, *one_piece)
    start = (jax.tree.map(jnp.zeros_like, sums), state.buffers)
    ((gradients, metrics), buffers), _ = jax.lax.scan(body, start, pieces)
    return gradients, metrics, buffers


def count_step(counters: Counters, finite: jax.Array) -> Counters:
    skipped = (~finite).astype(jnp.int32)
    return Counters(
        step=counters.step + 1,
        skipped=counters.skipped + skipped,
        skipped_in_a_row=jnp.where(finite, 0, counters.skipped_in_a_row + 1),
    )
