"""One layer: a mixer, and an mlp or a mixture of experts, which read the residual stream and add to it."""

from typing import Any

import jax

from lmjax.devices.mesh import constrain
from lmjax.models.config import LayerKind, ModelConfig
from lmjax.models.dropout import MIXER_SITE, MLP_SITE, dropout
from lmjax.models.layer_inputs import LayerInputs
from lmjax.models.layers import norm
from lmjax.models.mixers import MIXERS
from lmjax.models.mlp import mlp
from lmjax.models.moe import moe
from lmjax.parametrization import stream_factor
from lmjax.weights import Params, times


def block(
    p: Params,
    x_BTD: jax.Array,
    inputs: LayerInputs,
    cache: Any,
    cfg: ModelConfig,
    kind: LayerKind,
    layer: int | jax.Array,
) -> tuple[jax.Array, Any, moe.Tally | None]:
    """One layer: a mixer, then mlp or mixture of experts, each added to the residual stream."""
    mixer = MIXERS[kind.mixer]
    h_BTD = read_stream(p, mixer.name, x_BTD, cfg)
    h_BTD, cache = mixer.mix(p[mixer.name], h_BTD, inputs, cache, cfg, kind, layer)
    x_BTD = add_to_stream(p, mixer.name, x_BTD, h_BTD, inputs, cfg, layer, MIXER_SITE)

    h_BTD, tally = read_stream(p, "mlp", x_BTD, cfg), None
    if kind.mlp == "dense":
        h_BTD = mlp(p["mlp"], h_BTD, cfg)
    else:
        training = inputs.keys_B is not None
        h_BTD, tally = moe.mixture(p["moe"], h_BTD, inputs.real_BT, cfg, training=training, text_BT=inputs.text_BT)
    return add_to_stream(p, "mlp", x_BTD, h_BTD, inputs, cfg, layer, MLP_SITE), cache, tally


def read_stream(p: Params, part: str, x_BTD: jax.Array, cfg: ModelConfig) -> jax.Array:
    """What a part of a layer sees of the residual stream."""
    h_BTD = norm(p[f"{part}_norm"], x_BTD, cfg) if cfg.norm_position in ("pre", "pre_and_output") else x_BTD
    return constrain(h_BTD, "batch", "time", None)


def add_to_stream(
    p: Params,
    part: str,
    x_BTD: jax.Array,
    h_BTD: jax.Array,
    inputs: LayerInputs,
    cfg: ModelConfig,
    layer: int | jax.Array,
    site: int,
) -> jax.Array:
    """The residual stream with what a part of a layer gives."""
    h_BTD = constrain(h_BTD, "batch", "residual_time", None)
    if cfg.norm_position in ("output", "pre_and_output"):
        h_BTD = norm(p[f"{part}_output_norm"], h_BTD, cfg)
    if cfg.dropout:
        h_BTD = dropout(h_BTD, inputs.keys_B, inputs.dropout_rates["dropout"], layer, site)
    x_BTD = x_BTD + times(h_BTD, stream_factor(cfg.parametrization, cfg.depth))
    return norm(p[f"{part}_output_norm"], x_BTD, cfg) if cfg.norm_position == "post" else x_BTD
