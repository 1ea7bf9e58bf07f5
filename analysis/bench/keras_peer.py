"""What `speed.py` measures lmjax against, too: a GPT of Keras's own layers on its JAX backend, trained by `fit`.

It has the config's shape (layers, widths, heads, vocabulary, length, activation, dropout) and the form of the mini-GPT
in Chollet's Deep Learning with Python: LayerNorm after each part and after the embedding, learned positions, tied head,
biases, accuracy as a metric. It pays for what `fit` does around its compiled step, as its users do.
"""

import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # read once, when Keras is imported

import keras  # type: ignore[import-not-found, unused-ignore]
import numpy as np
from keras import layers, ops  # type: ignore[import-not-found, unused-ignore]

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
    x_BTD = layers.LayerNormalization()(embedding(tokens_BT))
    for _ in range(cfg.layers):
        attention = layers.MultiHeadAttention(cfg.heads, cfg.embed // cfg.heads, dropout=cfg.attention_dropout)
        y_BTD = layers.Dropout(cfg.dropout)(attention(x_BTD, x_BTD, use_causal_mask=True))
        x_BTD = layers.LayerNormalization()(x_BTD + y_BTD)
        h_BTF = layers.Dense(cfg.mlp, activation=ACTIVATIONS[cfg.activation])(x_BTD)
        y_BTD = layers.Dropout(cfg.dropout)(layers.Dense(cfg.embed)(h_BTF))
        x_BTD = layers.LayerNormalization()(x_BTD + y_BTD)
    return keras.Model(tokens_BT, embedding(x_BTD, reverse=True))


def train_steps(cfg: Config) -> Callable[[int], None] | None:
    """An epoch of so many steps, with AdamW in float32; None for another optimizer, activation or type."""
    settings, B, T = cfg.optimizer, cfg.train.batch, cfg.data.seq_len
    if settings.name != "adamw" or cfg.model.activation not in ACTIVATIONS or cfg.model.dtype != "float32":
        return None
    model = gpt(cfg.model, T)
    model.compile(
        optimizer=keras.optimizers.AdamW(
            1e-4, settings.weight_decay, settings.b1, settings.b2, settings.eps, global_clipnorm=settings.clip_norm
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    rows = np.random.default_rng(0).integers(cfg.model.dims["vocab"], size=(8 * B, T + 1), dtype=np.int32)

    def run(steps: int) -> None:
        rows_EU = rows[np.arange(steps * B) % len(rows)]
        model.fit(rows_EU[:, :-1], rows_EU[:, 1:], batch_size=B, shuffle=False, verbose=0)

    return run


def versions() -> str:
    return f"keras {importlib.metadata.version('keras')} on JAX"
