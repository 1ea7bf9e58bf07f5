"""Optimizers never see the stacking.

A stack of layers is one array with a leading batch axis, for the compiler's sake. A rule that looks at a weight's shape
or norm (Adafactor, Muon, trust ratios) would treat the stack as one weight and give other updates than for separate
layers. `per_weight` gives such a rule the weights one by one, so that stacked equals unstacked.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from lmjax.devices.mesh import constrain_leading
from lmjax.weights import Params, Spec, Weight, map_weights


def per_weight(rule: Callable[[Weight], optax.GradientTransformation], spec: Spec) -> optax.GradientTransformation:
    """Apply `rule(weight)` to each weight of `spec`, mapped over the weight's batch axes.

    `rule` receives the weight without its batch axes and returns a transformation of a single array. The state is the
    spec's nested dict with each weight's own state in its place, every array of it with the batch axes in front.
    """

    def init(params: Params) -> Any:
        def init_one(weight: Weight, p: jax.Array) -> Any:
            state = _mapped(weight, rule(weight.unstacked()).init)(p)
            return jax.tree.map(
                lambda x: constrain_leading(x, weight.batch_axes), state
            )  # constants have no sharding yet

        return map_weights(init_one, spec, params)

    def update(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        def update_one(weight: Weight, *arrays: Any) -> Any:
            return _mapped(weight, rule(weight.unstacked()).update)(*arrays)

        pairs = map_weights(update_one, spec, updates, state, params)
        directions = map_weights(lambda _, pair: pair[0], spec, pairs)
        return directions, map_weights(lambda _, pair: pair[1], spec, pairs)

    return optax.GradientTransformation(init, update)


def _mapped(weight: Weight, function: Callable[..., Any]) -> Callable[..., Any]:
    for _ in weight.batch_axes:
        function = jax.vmap(function)
    return function
