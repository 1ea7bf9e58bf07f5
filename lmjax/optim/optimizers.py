"""An optimizer as the train step uses it: clip, rule, scheduled learning rate."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lmjax.devices.mesh import replicated, shardings
from lmjax.optim.config import OptimizerConfig
from lmjax.optim.rules import OPTIMIZERS
from lmjax.optim.schedules import SCHEDULES, Hyper
from lmjax.weights import Params, Spec, abstract


class Optimizer(NamedTuple):
    """Pure functions, as in optax, except that the hyperparameters are an argument."""

    init: Callable[[Params], Any]
    """`init(params) -> opt_state`, a pytree of arrays whose structure never changes."""
    update: Callable[..., tuple[Params, Any]]
    """`update(grads, opt_state, params, hyper, step, norm) -> (updates, opt_state)`; add the updates to the params.

    `step` counts updates from 0. `norm` is the global norm of the gradients, which the caller needs anyway, for its
    finite gate: when `norm` is not finite, what comes out means nothing.
    """
    learning_rate: Callable[[jax.Array, Hyper], jax.Array]
    """`learning_rate(step, hyper)`: the one that update `step` uses."""


def build(cfg: OptimizerConfig, spec: Spec) -> Optimizer:
    """The optimizer that `cfg` names, for the weights of `spec`. Every scalar comes from `hyper`, at each update."""
    rule = OPTIMIZERS[cfg.name]
    schedule = SCHEDULES[cfg.schedule.name]

    def learning_rate(step: jax.Array, hyper: Hyper) -> jax.Array:
        return hyper["learning_rate"] * schedule(step, hyper)

    def init(params: Params) -> Any:
        unread: Hyper = defaultdict(lambda: jnp.zeros(()))  # a state starts the same whatever the hyperparameters
        return rule(spec, unread).init(params)

    def update(
        grads: Params, state: Any, params: Params, hyper: Hyper, step: jax.Array, norm: jax.Array
    ) -> tuple[Params, Any]:
        directions, state = rule(spec, hyper).update(clip(grads, norm, hyper), state, params)
        rate = learning_rate(step, hyper)
        return jax.tree.map(lambda direction: -rate * direction, directions), state

    return Optimizer(init, update, learning_rate)


def clip(grads: Params, norm: jax.Array, hyper: Hyper) -> Params:
    """Scale gradients of global norm `norm` down to `hyper["clip_norm"]` (Pascanu et al. 2013, arXiv:1211.5063).

    Gradients within the bound come back bit for bit.
    """
    scale = jnp.minimum(1.0, hyper["clip_norm"] / norm)
    return jax.tree.map(lambda g: scale * g, grads)


def state_shardings(optimizer: Optimizer, spec: Spec, mesh: jax.sharding.Mesh) -> Any:
    """A tree of NamedSharding like the optimizer's state: moments lie where their weights lie, counts everywhere.

    Raises ConfigError for a weight that its mesh axes do not divide.
    """

    def placed(array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    # Under Explicit axis types a sharding is part of the type, so tracing `init` tells where each array lies.
    params = jax.tree.map(placed, abstract(spec), shardings(spec, mesh))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(optimizer.init, params)
    return jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec) if x.sharding else replicated(mesh), state)
