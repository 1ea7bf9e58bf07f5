"""What a train step minimizes: the same step serves every objective."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lmjax.data.batch import Batch
from lmjax.losses import chunked_token_sums
from lmjax.metrics import Metrics
from lmjax.models.model import AfterUpdate, Model, unchanged
from lmjax.optim.schedules import Hyper
from lmjax.train.config import LossConfig
from lmjax.weights import Params, merge

Keys = jax.Array | None  # one per sample, [B]


class Loss(Protocol):
    def __call__(self, params: Params, frozen: Params, batch: Any, keys_B: Keys, hyper: Hyper) -> tuple[Any, Metrics]:
        """Return (what is minimized, summed over the batch; metrics as (sum, weight)).

        The gradient is taken in `params` alone. One metric must be `loss`: it is logged, and may differ from what is
        minimized. The step leaves an update out where its sum is not finite."""


class Objective(NamedTuple):
    """The step divides the sum that `loss` returns by `weight` of the whole batch, which is known before the batch is
    cut into microbatches.

    Both may be trees of several terms, each divided by its own weight; the quotients are added.
    """

    weight: Callable[[Any], Any]
    """batch -> the weight of its loss"""
    loss: Loss
    after_update: AfterUpdate = unchanged
    scalars: Mapping[str, float] = MappingProxyType({})
    """What it reads from `hyper` beside the optimizer's: runs that differ in these alone share a compiled step."""


def language_model(model: Model, cfg: LossConfig) -> Objective:
    """The loss of the next token, summed over tokens with their weights, and the model's auxiliary losses."""

    def loss(params: Params, frozen: Params, batch: Batch, keys_B: Keys, hyper: Hyper) -> tuple[Any, Metrics]:
        whole = merge(frozen, params)
        x_BTD, _, layer_metrics = model.hidden(
            whole,
            batch.tokens_BT,
            positions_BT=batch.positions_BT,
            segments_BT=batch.segments_BT,
            keys_B=keys_B,
            scalars=hyper,
        )
        sums = chunked_token_sums(
            model.unembed,
            model.head(whole),
            x_BTD,
            batch.targets_BT,
            batch.weights_BT,
            chunk=cfg.chunk,
            z_weight=hyper["z_weight"] if cfg.z_weight else 0.0,
            token_loss=cfg.name,
        )
        total_weight = batch.weights_BT.sum()
        metrics = {"loss": (sums.nll, total_weight), "accuracy": (sums.correct, total_weight), **layer_metrics}
        if cfg.z_weight:
            metrics["z_loss"] = (sums.z_loss, total_weight)
        auxiliary = sum(hyper[scalar] * layer_metrics[name][0] for name, scalar in model.auxiliary.items())
        return terms(sums.minimized, auxiliary), metrics

    def weight(batch: Batch) -> Any:
        padding = 0 if batch.positions_BT is None else (batch.positions_BT < 0).sum()
        return terms(batch.weights_BT.sum(), jnp.float32(batch.tokens_BT.size - padding))

    def terms(tokens: Any, auxiliary: Any) -> Any:
        return {"tokens": tokens, "auxiliary": auxiliary} if model.auxiliary else tokens

    return Objective(weight, loss, model.after_update, {**model.scalars, "z_weight": cfg.z_weight})


def scalar_arrays(scalars: Mapping[str, float]) -> Hyper:
    """The scalars as `hyper` holds them, in float32."""
    return {name: jnp.float32(value) for name, value in scalars.items()}
