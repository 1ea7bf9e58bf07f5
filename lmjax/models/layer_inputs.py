"""What all layers of one forward pass are given, and what a mixer is: the part of a layer that sees other tokens."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from lmjax.models.config import LayerKind, ModelConfig
from lmjax.models.position import Rotation
from lmjax.weights import Initializer, Params, Spec

Scalars = Mapping[str, Any]
"""The scalars of a config that a sweep may vary, by name: Python numbers, or traced arrays in a train step."""


class LayerInputs(NamedTuple):
    """What every layer of one forward pass is given beside the residual stream: the same for all of them."""

    rotations: dict[str, Rotation]
    """The rotary angles of each kind of mixer."""
    positions_BT: jax.Array | None
    real_BT: jax.Array
    """Which tokens are not padding."""
    segments_BT: jax.Array | None
    keys_B: jax.Array | None
    """One per sample in training, None in evaluation."""
    dropout_rates: Scalars
    """The rates of dropout, by the names in `dropout.DROPOUTS`."""
    front_1T: jax.Array | None = None
    """Which places every document of the row sees, if any: models/front.py."""
    text_BT: jax.Array | None = None
    """Which tokens are neither padding nor of a soft prompt, where there is one."""


class Mix(Protocol):
    """Let the tokens of each row see each other."""

    def __call__(
        self,
        p: Params,
        x_BTD: jax.Array,
        inputs: LayerInputs,
        cache: Any,
        cfg: ModelConfig,
        kind: LayerKind,
        layer: int | jax.Array,
    ) -> tuple[jax.Array, Any]:
        """(y_BTD, the cache with these tokens added). With a cache (decoding) earlier tokens are known from it alone;
        without one (training, scoring) it is None. `layer` is the layer's place in the model, perhaps traced."""


class Mixer(NamedTuple):
    """One way for tokens to see each other, by its name in `model.pattern`."""

    name: str
    """The key of its weights in a layer's params."""
    weights: Callable[[ModelConfig, Initializer, Initializer], Spec]
    """(cfg, initializer into the layer, initializer out of it) -> the weights of one layer"""
    mix: Mix
    empty_cache: Callable[[Params, ModelConfig, LayerKind, int, int], Any]
    """(p, cfg, kind, batch, length) -> one layer's memory of the tokens already seen: arrays with the batch in front,
    or scalars"""
    flops: Callable[..., int]
    """(cfg, kind, T, *, causal) -> FLOPs between activations in one layer's forward pass over a row of T tokens"""
