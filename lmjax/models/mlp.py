"""The position-wise network, plain or gated (Shazeer 2020, arXiv:2002.05202)."""

from collections.abc import Callable

import jax

from lmjax.models.activations import ACTIVATIONS
from lmjax.models.config import ModelConfig
from lmjax.models.linear import linear
from lmjax.weights import Initializer, Params, Spec, Weight, zeros


def mlp_weights(cfg: ModelConfig, into: Initializer, out: Initializer, width: str = "mlp") -> Spec:
    """`width` names the axis of hidden units."""
    weights = {"up": Weight(f"embed -> {width}", init=into), "down": Weight(f"{width} -> embed", init=out)}
    if cfg.gated:
        weights["gate"] = Weight(f"embed -> {width}", init=into)
    if cfg.bias:
        weights["up_bias"] = Weight(f"-> {width}", kind="bias", init=zeros)
        weights["down_bias"] = Weight("-> embed", kind="bias", init=zeros)
    if cfg.bias and cfg.gated:
        weights["gate_bias"] = Weight(f"-> {width}", kind="bias", init=zeros)
    return weights


def mlp(p: Params, x_BTD: jax.Array, cfg: ModelConfig) -> jax.Array:
    def project(x: jax.Array, name: str) -> jax.Array:
        return linear(x, p[name], p.get(f"{name}_bias"))

    return feed_forward(project, x_BTD, cfg)


def feed_forward(project: Callable[[jax.Array, str], jax.Array], x: jax.Array, cfg: ModelConfig) -> jax.Array:
    """x[..., D] -> [..., D], where `project(x, name)` multiplies by the weight of that name."""
    activate = ACTIVATIONS[cfg.activation]
    h = project(x, "up")
    h = activate(project(x, "gate")) * h if cfg.gated else activate(h)
    return project(h, "down")
