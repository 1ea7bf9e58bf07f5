"""What a train step minimizes: the same step serves every objective."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lmjax.data.batch import Batch
from lmjax.losses import chunked_token_sums
from lmjax.metrics import Metrics
from lmjax.models.model import Model
from lmjax.optim.schedules import Hyper
from lmjax.train.config import LossConfig
from lmjax.weights import Params, merge

Keys = jax.Array | None  # one per sample, [B]


class Loss(Protocol):
    def __call__(self, params: Params, frozen: Params, batch: Any, keys_B: Keys, hyper: Hyper) -> tuple[Any, Metrics]:
        """(the loss, summed over the batch; metrics as (sum, weight), `loss` among them, which is logged and must be
        finite). The gradient is taken in `params` alone."""


def _unchanged(params: Params, metrics: Metrics, hyper: Hyper) -> tuple[Params, Metrics]:
    return params, metrics


class Objective(NamedTuple):
    """The step divides `loss`'s sum by `weight` of the whole batch, known before the batch is cut into microbatches.

    Both may be trees of several terms, each divided by its own weight; the quotients are added.
    """

    weight: Callable[[Any], Any]
    """batch -> the weight of its loss"""
    loss: Loss
    after_update: Callable[[Params, Metrics, Hyper], tuple[Params, Metrics]] = _unchanged
    """After an update, with the metrics of the whole batch: see `Model.after_update`."""
    scalars: Mapping[str, float] = MappingProxyType({})
    """What it reads from `hyper` beside the optimizer's: runs that differ in these alone share a compiled step."""


def language_model(model: Model, cfg: LossConfig) -> Objective:
    """The loss of the next token, summed over tokens with their weights, and the model's auxiliary losses."""

    def loss(params: Params, frozen: Params, batch: Batch, keys_B: Keys, hyper: Hyper) -> tuple[Any, Metrics]:
        weights = merge(frozen, params)
        x_BTD, _, layer_metrics = model.hidden(
            weights,
            batch.tokens_BT,
            positions_BT=batch.positions_BT,
            segments_BT=batch.segments_BT,
            keys_B=keys_B,
            hyper=hyper,
        )
        sums = chunked_token_sums(
            model.unembed,
            model.head(weights),
            x_BTD,
            batch.targets_BT,
            batch.weights_BT,
            chunk=cfg.chunk,
            z_weight=hyper["z_weight"] if cfg.z_weight else 0.0,
            token_loss=cfg.name,
        )
        weight = batch.weights_BT.sum()
        metrics = {"loss": (sums.nll, weight), "accuracy": (sums.correct, weight), **layer_metrics}
        if cfg.z_weight:
            metrics["z_loss"] = (sums.z_loss, weight)
        auxiliary = sum(hyper[scalar] * layer_metrics[name][0] for name, scalar in model.auxiliary.items())
        return terms(sums.loss, auxiliary), metrics

    def weight(batch: Batch) -> Any:
        padding = 0 if batch.positions_BT is None else (batch.positions_BT < 0).sum()
        return terms(batch.weights_BT.sum(), jnp.float32(batch.tokens_BT.size - padding))

    def terms(tokens: Any, auxiliary: Any) -> Any:
        return {"tokens": tokens, "auxiliary": auxiliary} if model.auxiliary else tokens

    return Objective(weight, loss, model.after_update, {**model.scalars, "z_weight": cfg.z_weight})


def scalar_arrays(scalars: Mapping[str, float]) -> Hyper:
    """As `hyper` holds them, float32."""
    return {name: jnp.float32(value) for name, value in scalars.items()}
