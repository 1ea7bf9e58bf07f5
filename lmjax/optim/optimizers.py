"""An optimizer as the train step uses it: clip, rule, scheduled learning rate."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lmjax.devices.mesh import replicated, shardings
from lmjax.optim.config import OptimizerConfig
from lmjax.optim.rules import LR_MULTIPLIERS, OPTIMIZERS, LRMultiplier
from lmjax.optim.schedules import SCHEDULES, Hyper
from lmjax.weights import Params, Spec, Weight, abstract, map_weights, times


class Update(Protocol):
    def __call__(
        self, grads: Params, state: Any, params: Params, hyper: Hyper, step: jax.Array, norm: jax.Array
    ) -> tuple[Params, Any]:
        """(updates to add to the params, the new optimizer state).

        `step` counts updates from 0. `norm` is the global norm of the gradients, which the caller needs anyway, for its
        finite gate: when `norm` is not finite, what comes out means nothing.
        """


LearningRate = Callable[[jax.Array, Hyper], jax.Array]
"""`learning_rate(step, hyper)`: the one that update `step` uses."""


class Optimizer(NamedTuple):
    """Pure functions, as in optax, except that the hyperparameters are an argument."""

    init: Callable[[Params], Any]
    """`init(params) -> opt_state`, a pytree of arrays whose structure never changes."""
    update: Update
    learning_rate: LearningRate


def build(cfg: OptimizerConfig, spec: Spec) -> Optimizer:
    """The optimizer that `cfg` names, for the weights of `spec`. Every scalar comes from `hyper`, at each update."""
    rule, learning_rate = OPTIMIZERS[cfg.name], scheduled_rate(cfg)
    multiplier = LR_MULTIPLIERS.get(cfg.name)

    def init(params: Params) -> Any:
        unread: Hyper = defaultdict(lambda: jnp.zeros(()))  # a state starts the same whatever the hyperparameters
        return rule(spec, unread).init(params)

    def update(
        grads: Params, state: Any, params: Params, hyper: Hyper, step: jax.Array, norm: jax.Array
    ) -> tuple[Params, Any]:
        grads = map_weights(lambda weight, g: times(g, weight.scaling.gradient), spec, clip(grads, norm, hyper))
        directions, state = rule(spec, hyper).update(grads, state, params)
        if multiplier is not None:
            directions = scale_by_weight(multiplier, spec, directions, hyper)
        now = learning_rate(step, hyper)
        return jax.tree.map(lambda direction: -now * direction, directions), state

    return Optimizer(init, update, learning_rate)


def scheduled_rate(cfg: OptimizerConfig) -> LearningRate:
    """The learning rate over time."""
    schedule = SCHEDULES[cfg.schedule.name]
    return lambda step, hyper: hyper["learning_rate"] * schedule(step, hyper)


def scale_by_weight(multiplier: LRMultiplier, spec: Spec, directions: Params, hyper: Hyper) -> Params:
    def scale(weight: Weight, direction: jax.Array) -> jax.Array:
        factor = multiplier(weight, hyper)
        return direction if factor is None else factor * direction

    return map_weights(scale, spec, directions)


def clip(grads: Params, norm: jax.Array, hyper: Hyper) -> Params:
    """Scale gradients of global norm `norm` down to `hyper["clip_norm"]` (Pascanu et al. 2013, arXiv:1211.5063).

    Gradients within the bound come back bit for bit.
    """
    scale = jnp.minimum(1.0, hyper["clip_norm"] / norm)
    return jax.tree.map(lambda g: scale * g, grads)


def state_shardings(optimizer: Optimizer, spec: Spec, mesh: jax.sharding.Mesh) -> Any:
    """A tree of NamedSharding like the optimizer's state: moments are sharded as their weights are, counts replicated.

    Raises ConfigError for a weight that its mesh axes do not divide.
    """

    def placed(array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    # Under Explicit axis types a sharding is part of the type, so tracing `init` tells how each array is sharded.
    params = jax.tree.map(placed, abstract(spec), shardings(spec, mesh))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(optimizer.init, params)
    return jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec) if x.sharding else replicated(mesh), state)
