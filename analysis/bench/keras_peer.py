"""What `speed.py` measures lmjax against, too: a GPT of Keras's own layers on its JAX backend, trained by `fit`.

It is the mini-GPT of Chollet's Deep Learning with Python: LayerNorm after each part and after the embedding, learned
positions, tied head, biases, accuracy as a metric. It pays for what `fit` does around its compiled step, as its users
do.
"""

import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # read once, when Keras is imported

import keras  # type: ignore[import-not-found, unused-ignore]
import numpy as np
from keras import layers, ops  # type: ignore[import-not-found, unused-ignore]

from analysis.bench.gpt import GPT, Work, batches, initial_weights, is_gpt
from lmjax.config import Config
from lmjax.models.config import ModelConfig

ACTIVATIONS = {"relu": "relu", "gelu": keras.activations.gelu}


class Embedding(keras.Layer):  # type: ignore[misc, unused-ignore]
    """Tokens and their positions, and back to logits."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.tokens = layers.ReversibleEmbedding(cfg.vocab, cfg.embed, embeddings_initializer="random_normal")
        self.positions = layers.Embedding(cfg.context, cfg.embed, embeddings_initializer="random_normal")

    def call(self, x: Any, reverse: bool = False) -> Any:
        return self.tokens(x, reverse=True) if reverse else self.tokens(x) + self.positions(ops.arange(x.shape[1]))


def gpt(cfg: ModelConfig, T: int) -> Any:
    """tokens [B, T] -> logits [B, T, V]."""
    tokens_BT, embedding = keras.Input((T,), dtype="int32"), Embedding(cfg)
    x_BTD = layers.LayerNormalization(epsilon=cfg.norm_epsilon)(embedding(tokens_BT))
    for _ in range(cfg.layers):
        attention = layers.MultiHeadAttention(cfg.heads, cfg.embed // cfg.heads, dropout=cfg.attention_dropout)
        y_BTD = layers.Dropout(cfg.dropout)(attention(x_BTD, x_BTD, use_causal_mask=True))
        x_BTD = layers.LayerNormalization(epsilon=cfg.norm_epsilon)(x_BTD + y_BTD)
        h_BTF = layers.Dense(cfg.mlp, activation=ACTIVATIONS[cfg.activation])(x_BTD)
        y_BTD = layers.Dropout(cfg.dropout)(layers.Dense(cfg.embed)(h_BTF))
        x_BTD = layers.LayerNormalization(epsilon=cfg.norm_epsilon)(x_BTD + y_BTD)
    return keras.Model(tokens_BT, embedding(x_BTD, reverse=True))


def train_steps(cfg: Config) -> Work | None:
    """An epoch of so many steps, with AdamW in float32; None for another optimizer, model or type."""
    settings, model = cfg.optimizer, cfg.model
    is_mini_gpt = is_gpt(model) and model.norm_position == "post" and model.embed_norm and model.bias
    if not is_mini_gpt or settings.name != "adamw" or model.activation not in ACTIVATIONS or model.dtype != "float32":
        return None
    network = gpt(model, cfg.data.seq_len)
    network.set_weights(list(weights(initial_weights(cfg), model.heads)))
    network.compile(
        optimizer=keras.optimizers.AdamW(
            settings.learning_rate,
            settings.weight_decay,
            settings.b1,
            settings.b2,
            settings.eps,
            global_clipnorm=settings.clip_norm,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    data = batches(cfg)

    def run(steps: int) -> float:
        chosen = [data[i % len(data)] for i in range(steps)]
        tokens_ET, targets_ET = (
            np.concatenate([getattr(b, name) for b in chosen]) for name in ("tokens_BT", "targets_BT")
        )
        fitted = network.fit(tokens_ET, targets_ET, batch_size=cfg.train.batch, shuffle=False, verbose=0)
        return float(fitted.history["loss"][-1])

    return run


def weights(start: GPT, heads: int) -> Iterator[Any]:
    """In the order in which Keras made its own."""
    yield start.embed_VD
    yield start.position_TD
    yield from start.embed_norm or ()
    for layer in start.layers:
        for w_ID, bias_D in layer.qkv:
            yield w_ID.reshape(len(w_ID), heads, -1)
            yield bias_D.reshape(heads, -1)
        yield layer.output.weight.reshape(heads, -1, layer.output.weight.shape[1])
        yield layer.output.bias
        yield from (*layer.norms[0], *layer.up, *layer.down, *layer.norms[1])


def versions() -> str:
    return f"keras {importlib.metadata.version('keras')} on JAX"
