"""What a train step minimizes. Pretraining, fine-tuning and policy learning differ in their objective alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.data.batch import Batch
from lmjax.losses import chunked_token_sums
from lmjax.metrics import Metrics
from lmjax.models.model import Model
from lmjax.train.config import LossConfig as LossConfig
from lmjax.weights import Params

Keys = jax.Array | None  # one per sample, [B]


class Objective(NamedTuple):
    """The step divides `loss`'s sum by `weight` of the whole batch, known before the batch is cut into microbatches.

    Both may be trees of several terms, each divided by its own weight; the quotients are added.
    """

    weight: Callable[[Batch], Any]
    loss: Callable[[Params, Params, Any, Batch, Keys], tuple[Any, Metrics, Any]]
    """(params, frozen, buffers, batch, keys_B) -> (loss sum, metrics as (sum, weight), new buffers)"""
    settle: Callable[[Params, Metrics], tuple[Params, Metrics]] = lambda params, metrics: (params, metrics)
    """After an update, with the metrics of the whole batch: see `Model.settle`."""


def language_model(model: Model, cfg: LossConfig) -> Objective:
    """The loss of the next token, summed over tokens with their weights, and the model's auxiliary losses."""

    def loss(params: Params, frozen: Params, buffers: Any, batch: Batch, keys_B: Keys) -> tuple[Any, Metrics, Any]:
        weights = {**frozen, **params}
        x_BTD, _, layer_metrics = model.hidden(
            weights,
            batch.tokens_BT,
            positions_BT=batch.positions_BT,
            segments_BT=batch.segments_BT,
            keys_B=keys_B,
        )
        sums = chunked_token_sums(
            model.unembed,
            {name: weights[name] for name in model.head},
            x_BTD,
            batch.targets_BT,
            batch.weights_BT,
            chunk=cfg.chunk,
            z_weight=cfg.z_weight,
            token_loss=cfg.name,
        )
        weight = batch.weights_BT.sum()
        metrics = {"loss": (sums.nll, weight), "accuracy": (sums.correct, weight), **layer_metrics}
        if cfg.z_weight:
            metrics["z_loss"] = (sums.z_loss, weight)
        auxiliary = sum(scale * layer_metrics[name][0] for name, scale in model.auxiliary.items())
        return terms(sums.loss, auxiliary), metrics, buffers

    def weight(batch: Batch) -> Any:
        padding = 0 if batch.positions_BT is None else (batch.positions_BT < 0).sum()
        return terms(batch.weights_BT.sum(), jnp.float32(batch.tokens_BT.size - padding))

    def terms(tokens: Any, auxiliary: Any) -> Any:
        return {"tokens": tokens, "auxiliary": auxiliary} if model.auxiliary else tokens

    return Objective(weight=weight, loss=loss, settle=model.settle)
