"""The train step: gradient, finite gate, update. Everything it does not need to know is an argument."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from lmjax.devices.mesh import shards
from lmjax.devices.rows import split_rows
from lmjax.metrics import Metrics
from lmjax.optim.optimizers import Optimizer
from lmjax.train.objective import Keys, Objective
from lmjax.train.spikes import judge
from lmjax.train.state import Counters, TrainState
from lmjax.weights import Params


class Step(Protocol):
    def __call__(self, state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        """(the next state, metrics as (sum, weight)). A batch is a dataclass as in devices/rows.py, with `ids_B`."""


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    microbatches: int = 1,
    noise_scale: bool = False,
    skip_spikes: float | None = None,
) -> Step:
    """The train step. Jit it with the state donated.

    The gradient is that of what is minimized, summed over the whole batch and divided by its weight, so cutting the
    batch into microbatches changes nothing but memory, however unevenly the weights are spread.

    The finite gate tests the norm of the whole gradient and the sum of the metric `loss`, which is logged. An update
    where one of them is not finite is left out and counted; parameters and optimizer state then stay as they were.

    With `skip_spikes`, so many standard deviations, updates that are spikes by spikes.py are left out, too.

    `noise_scale` adds the metrics of `noise`, which takes several microbatches.
    """

    def step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        keys_B = sample_keys(state.hyper["seed"], batch.ids_B)
        gradients, metrics = accumulate(objective, state, frozen, batch, keys_B, microbatches, squares=noise_scale)
        norm = optax.tree.norm(gradients)
        if noise_scale:
            metrics |= noise(norm**2, metrics.pop(SQUARES), rows=len(batch.ids_B))
        logged_loss, weight = metrics["loss"]
        taken, recent, one = jnp.isfinite(norm) & jnp.isfinite(logged_loss), state.recent, jnp.ones(())
        if recent is not None and skip_spikes is not None:
            spike, recent = judge(recent, logged_loss / weight, norm, taken, skip_spikes)
            taken &= ~spike
            metrics["spikes"] = (spike.astype(jnp.float32), one)

        updates, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, state.hyper, state.counters.step, norm
        )
        params, metrics = objective.after_update(optax.apply_updates(state.params, updates), metrics, state.hyper)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        metrics |= {
            "grad_norm": (norm, one),
            "lr": (optimizer.learning_rate(state.counters.step, state.hyper), one),
            "skipped": ((~taken).astype(jnp.float32), one),
        }
        counters, average = count_step(state.counters, taken), moved_average(state, params)
        return TrainState(params, opt_state, state.hyper, counters, average, recent), metrics

    return step


def moved_average(state: TrainState, params: Params) -> Params | None:
    """The exponential moving average of the weights after every update so far, `params` the newest of them.

    With decay d it is (1 - d) (p_t + d p_{t-1} + ... + d^{t-1} p_1) / (1 - d^t): the initial weights have no part in
    it, as in Adam's corrected moments (Kingma & Ba 2015, arXiv:1412.6980, section 3).
    """
    if state.average is None:
        return None
    decay, updates = state.hyper["average_decay"], state.counters.step + 1
    share = (1 - decay) / -jnp.expm1(updates * jnp.log(decay))
    return jax.tree.map(lambda average, p: average + share * (p - average), state.average, params)


class StackedStep(Protocol):
    def __call__(
        self, states: Sequence[TrainState], frozens: Sequence[Params], batches: Sequence[Any]
    ) -> Sequence[tuple[TrainState, Metrics]]:
        """One step of each of many runs."""


def stacked(step: Step) -> StackedStep:
    """The step of many runs that differ in the values of their arrays alone, scalar hyperparameters and seeds among
    them: on a leading axis, by vmap."""

    def stack(trees: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def steps(
        states: Sequence[TrainState], frozens: Sequence[Params], batches: Sequence[Any]
    ) -> Sequence[tuple[TrainState, Metrics]]:
        made = jax.vmap(step)(stack(states), stack(frozens), stack(batches))
        return [jax.tree.map(lambda x, run=run: x[run], made) for run in range(len(states))]

    return steps


def sample_keys(seed: jax.Array, ids_B: jax.Array) -> jax.Array:
    """One key per sample, named by the run's seed and the sample's global index."""
    return jax.vmap(lambda sample: jax.random.fold_in(jax.random.key(seed), sample))(ids_B)


SQUARES = "squares"
"""The metric with the squared norms of what each microbatch adds to the gradient: (their sum, their number)."""


def noise(whole: jax.Array, squares: tuple[jax.Array, jax.Array], *, rows: int) -> Metrics:
    """Unbiased estimates of |G|^2 and tr(S), G the true gradient and S the covariance of that of one row.

    From the squared norm of the gradient of a batch of `rows` rows, `whole`, and those of its microbatches, all taken
    to weigh the same. The mean of tr(S) over the mean of |G|^2 is the simple noise scale, a batch in rows (McCandlish
    et al. 2018, arXiv:1812.06162, appendix A.1); a single step's quotient says nothing.
    """
    total, number = squares
    pieces = total * number  # the mean of their own gradients' squares; each was divided by the whole batch's weight
    signal = (number * whole - pieces) / (number - 1)
    trace = rows * (pieces - whole) / (number - 1)
    return {"noise_signal": (signal, jnp.ones(())), "noise_trace": (trace, jnp.ones(()))}


def accumulate(
    objective: Objective,
    state: TrainState,
    frozen: Params,
    batch: Any,
    keys_B: Keys,
    microbatches: int,
    *,
    squares: bool = False,
) -> tuple[Params, Metrics]:
    """The gradient of (what is minimized / batch weight), and the metrics, SQUARES among them where asked for."""
    scale = jax.tree.map(lambda weight: 1 / jnp.where(weight > 0, weight, 1), objective.weight(batch))

    def gradient(batch: Any, keys_B: Keys) -> tuple[Params, Metrics]:
        def loss(params: Params) -> tuple[jax.Array, Metrics]:
            minimized, metrics = objective.loss(params, frozen, batch, keys_B, state.hyper)
            return optax.tree.sum(jax.tree.map(jnp.multiply, minimized, scale)), metrics

        gradients, metrics = jax.grad(loss, has_aux=True)(state.params)
        return gradients, ({**metrics, SQUARES: squared_norm(gradients)} if squares else metrics)

    if microbatches == 1 or shards("layers") > 1:  # a pipeline has its own loop over microbatches
        return gradient(batch, keys_B)

    def body(sums: Any, inputs: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradient(*inputs)), None

    pieces = jax.tree.map(lambda x: split_rows(x, microbatches), (batch, keys_B))
    one_piece = jax.tree.map(lambda x: x[0], pieces)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, *one_piece))
    sums, _ = jax.lax.scan(body, zeros, pieces)
    return sums


def squared_norm(gradients: Params) -> tuple[jax.Array, jax.Array]:
    """The squared norm as a metric, (sum, weight)."""
    return optax.tree.norm(gradients, squared=True), jnp.ones(())


def count_step(counters: Counters, taken: jax.Array) -> Counters:
    skipped = (~taken).astype(jnp.int32)
    return Counters(
        step=counters.step + 1,
        skipped=counters.skipped + skipped,
        skipped_in_a_row=jnp.where(taken, 0, counters.skipped_in_a_row + 1),
    )
