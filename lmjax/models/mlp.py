"""The position-wise network, plain or gated (Shazeer 2020, arXiv:2002.05202)."""

import jax

from lmjax.models.activations import ACTIVATIONS
from lmjax.models.config import ModelConfig
from lmjax.models.linear import linear
from lmjax.weights import Initializer, Params, Spec, Weight, zeros


def mlp_weights(cfg: ModelConfig, into: Initializer, out: Initializer) -> Spec:
    weights = {"up": Weight("embed -> mlp", init=into), "down": Weight("mlp -> embed", init=out)}
    if cfg.gated:
        weights["gate"] = Weight("embed -> mlp", init=into)
    if cfg.bias:
        weights["up_bias"] = Weight("-> mlp", kind="bias", init=zeros)
        weights["down_bias"] = Weight("-> embed", kind="bias", init=zeros)
    if cfg.bias and cfg.gated:
        weights["gate_bias"] = Weight("-> mlp", kind="bias", init=zeros)
    return weights


def mlp(p: Params, x_BTD: jax.Array, cfg: ModelConfig) -> jax.Array:
    activate = ACTIVATIONS[cfg.activation]
    h_BTF = linear(x_BTD, p["up"], p.get("up_bias"))
    if cfg.gated:
        h_BTF = activate(linear(x_BTD, p["gate"], p.get("gate_bias"))) * h_BTF
    else:
        h_BTF = activate(h_BTF)
    return linear(h_BTF, p["down"], p.get("down_bias"))
