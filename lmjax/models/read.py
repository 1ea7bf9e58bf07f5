"""How a layer gets the weight that it multiplies by from the weight as it is stored.

The embedding table and the output head are gathered elsewhere (layers.lookup_tokens, losses.py), by way of `as_array`.
"""

from typing import Any

import jax

from lmjax.devices.gather import gather
from lmjax.weights import Params, Spec, Weight, map_weights


def read(spec: Any, stored: Any, dtype: str) -> Any:
    """Stored weights (one, or a tree of them, as `spec` is) as a layer uses them: arrays, cast to `dtype`, gathered.

    Experts come back split over their devices: a mixture gathers them where it uses them.
    """
    return gather(map_weights(lambda weight, w: cast(weight, as_array(weight, w), dtype), spec, stored), spec)


def as_array(weight: Weight, stored: Any) -> jax.Array:
    """The array of a weight. What is stored otherwise (quantised, or with an adapter beside it) is a pytree with a
    method `as_array(weight)`, which is called where the weight is read, layer by layer."""
    return stored.as_array(weight) if hasattr(stored, "as_array") else stored


def cast(weight: Weight, w: jax.Array, dtype: str) -> jax.Array:
    """Matrices are multiplied in `dtype`, but for those declared float32; all other weights stay in float32."""
    return w.astype(dtype) if (weight.kind == "matmul" or weight.tied) and not weight.float32 else w


def head(spec: Spec, params: Params, names: tuple[str, ...]) -> Params:
    """The top-level weights of these names as arrays, not yet gathered: a loss gathers them once for all its chunks."""
    return {name: as_array(spec[name], params[name]) for name in names}
