"""What all contenders of `speed.py` begin with: lmjax's own initial weights, read as those of a GPT, and its batches.

A GPT here has learned positions, LayerNorm after each part, as Chollet's mini-GPT, or before it, as GPT-2, and a tied
head. Of a config that asks for something else peers have the shape alone, and other losses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.config import Config
from lmjax.data.batch import Batch
from lmjax.models.config import ModelConfig
from lmjax.registry import without_data
from lmjax.run.assemble import assemble, initial_state

BATCHES = 8
"""Different ones, in turn: none is learnt by heart."""

Work = Callable[[int], float | None]
"""Does something that many times and returns when all of it is done: in training, the loss of the last step."""

Array = Any
"""Of numpy, or as the peer's own library has it."""


class Affine(NamedTuple):
    """A product with a weight [in, out], or LayerNorm's scale; and what is added, None where nothing is."""

    weight: Array
    bias: Array


class Layer(NamedTuple):
    qkv: tuple[Affine, ...]
    output: Affine
    up: Affine
    down: Affine
    norms: tuple[Affine, Affine]
    """Of attention and of the mlp."""


class GPT(NamedTuple):
    embed_VD: Array
    position_TD: Array
    embed_norm: Affine | None
    layers: tuple[Layer, ...]
    final_norm: Affine | None


def is_gpt(cfg: ModelConfig) -> bool:
    asked = (cfg.position, cfg.norm, cfg.norm_position in ("pre", "post"), cfg.tied, cfg.gated, cfg.qk_norm)
    return asked == ("learned", "layer", True, True, False, False)


def initial_weights(cfg: Config) -> GPT:
    """Those of lmjax, in numpy. The model is one for which `is_gpt` holds."""
    assert is_gpt(cfg.model)
    params, D = jax.device_get(initial_state(assemble(without_data(cfg))).params), cfg.model.embed
    part = "output_norm" if cfg.model.norm_position == "post" else "norm"

    def norm(p: Any) -> Affine:
        return Affine(p["scale"], p.get("bias"))

    def affine(p: Any, name: str, *shape: int) -> Affine:
        bias = p.get(f"{name}_bias")
        return Affine(p[name].reshape(shape), None if bias is None else bias.ravel())

    def layer(p: Any) -> Layer:
        attention, mlp = p["attention"], p["mlp"]
        return Layer(
            tuple(affine(attention, name, D, -1) for name in ("query", "key", "value")),
            affine(attention, "output", -1, D),
            affine(mlp, "up", D, -1),
            affine(mlp, "down", -1, D),
            (norm(p[f"attention_{part}"]), norm(p[f"mlp_{part}"])),
        )

    stacked = params["segments"]["0"]["0"]
    layers = (jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(cfg.model.layers))
    norms = [norm(params[name]) if name in params else None for name in ("embed_norm", "final_norm")]
    return GPT(params["embed"], params["position"], norms[0], tuple(map(layer, layers)), norms[1])


def batches(cfg: Config) -> list[Batch]:
    """Random tokens."""
    return [random_batch(cfg, seed) for seed in range(BATCHES)]


def random_batch(cfg: Config, seed: int) -> Batch:
    shape = (cfg.train.batch, cfg.data.seq_len + 1)
    rows = np.random.default_rng(seed).integers(0, cfg.model.dims["vocab"], shape, dtype=np.int32)
    weights = np.ones((shape[0], shape[1] - 1), np.float32)
    return Batch(rows[:, :-1], rows[:, 1:], weights, np.arange(shape[0], dtype=np.int32) + seed * shape[0])
