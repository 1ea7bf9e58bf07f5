"""The update rules: functions `(spec, hyper) -> optax.GradientTransformation`, one line each in OPTIMIZERS.

The transformation turns gradients into a direction in units of the learning rate; optimizers.py clips before it and
multiplies by minus the scheduled rate after it. Hyperparameters are traced arrays: a rule passes them on and never
branches on them, and `init` does not read them. What acts entry by entry takes the whole tree; what depends on a
weight's shape or norm goes through `per_weight`.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from lmjax.optim.adafactor import scale_by_factored_rms
from lmjax.optim.muon import is_hidden_matrix, orthogonalize
from lmjax.optim.schedules import Hyper
from lmjax.optim.stacking import per_weight
from lmjax.weights import Params, Spec, Weight, decays, map_weights, times


def decay(spec: Spec, hyper: Hyper) -> optax.GradientTransformation:
    """Decoupled weight decay: add `weight_decay * w` to the direction of every weight that `weights.decays`.

    The learning rate multiplies it, as in optax and PyTorch: an update takes away learning_rate * weight_decay * w.
    Before that the direction is multiplied by the rate of a parametrized weight, which has no part in its decay.
    """

    def add(updates: Params, params: Params) -> Params:
        def direction(weight: Weight, u: jax.Array, p: jax.Array) -> jax.Array:
            u = times(u, weight.scaling.rate)
            return u + hyper["weight_decay"] * p if decays(weight) else u

        return map_weights(direction, spec, updates, params)

    return optax.stateless(add)


def adam(hyper: Hyper) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=hyper["b1"], b2=hyper["b2"], eps=hyper["eps"])


def adamw(spec: Spec, hyper: Hyper) -> optax.GradientTransformation:
    """Adam with decoupled decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    return optax.chain(adam(hyper), decay(spec, hyper))


def lion(spec: Spec, hyper: Hyper) -> optax.GradientTransformation:
    """The sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675).

    Its authors use b2 0.99, a learning rate 3 to 10 times below AdamW's and a decay as many times above.
    """
    return optax.chain(optax.scale_by_lion(b1=hyper["b1"], b2=hyper["b2"]), decay(spec, hyper))


def sgd(spec: Spec, hyper: Hyper) -> optax.GradientTransformation:
    """Nesterov momentum, undamped (Sutskever et al. 2013); momentum 0 is plain gradient descent."""
    return optax.chain(optax.trace(hyper["momentum"], nesterov=True), decay(spec, hyper))


def adafactor(spec: Spec, hyper: Hyper) -> optax.GradientTransformation:
    """A factored second moment, no momentum, each weight's step clipped to a root mean square of 1.

    Without Adafactor's relative step sizes: the learning rate neither follows 1/sqrt(t) nor multiplies by each weight's
    own scale, so it means what it means for AdamW (as in Zhai et al. 2022, arXiv:2106.04560).
    """

    def rule(weight: Weight) -> optax.GradientTransformation:
        return optax.chain(scale_by_factored_rms(weight), optax.clip_by_block_rms(1.0))

    return optax.chain(per_weight(rule, spec), decay(spec, hyper))


def muon(spec: Spec, hyper: Hyper) -> optax.GradientTransformation:
    """Orthogonalized Nesterov momentum for hidden matrices, AdamW for all other weights, at `adam_rate` below.

    Steps of matrices are scaled to AdamW's size, so AdamW's learning rate and decay carry over (arXiv:2502.16982).
    """

    def rule(weight: Weight) -> optax.GradientTransformation:
        if not is_hidden_matrix(weight):
            return adam(hyper)
        # A chain of one, because a chain's state is a tuple: that tuple is in the paths of checkpoints.
        return optax.chain(optax.trace(hyper["momentum"], nesterov=True))

    def orthogonal(updates: Params, params: Params) -> Params:
        del params
        return map_weights(lambda weight, u: orthogonalize(weight, u) if is_hidden_matrix(weight) else u, spec, updates)

    return optax.chain(per_weight(rule, spec), optax.stateless(orthogonal), decay(spec, hyper))


def adam_rate(weight: Weight, hyper: Hyper) -> jax.Array | None:
    """The rate of the weights that Muon leaves to Adam, over the rate of hidden matrices."""
    return None if is_hidden_matrix(weight) else hyper["adam_rate"]


LRMultiplier = Callable[[Weight, Hyper], Any]
"""What multiplies the learning rate of one weight, decay included; None leaves it as it is."""

LR_MULTIPLIERS: dict[str, LRMultiplier] = {
    "muon": adam_rate,
}
"""The multiplier of each optimizer that does not train every weight at the same rate, by its name in OPTIMIZERS."""

OPTIMIZERS: dict[str, Callable[[Spec, Hyper], optax.GradientTransformation]] = {
    "adafactor": adafactor,
    "adamw": adamw,
    "lion": lion,
    "muon": muon,
    "sgd": sgd,
}
