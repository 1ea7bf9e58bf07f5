"""What `speed.py` measures lmjax against, too: the same GPT written out by hand in plain JAX, tuned for one device.

Activations are kept as [B*T, D], so that every weight's gradient is a product of two matrices; layers are unrolled; the
state is donated. No dropout, no finite gate, no metrics but the loss.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from analysis.bench.gpt import GPT, Affine, Work, batches, initial_weights, is_gpt
from lmjax.config import Config
from lmjax.models.activations import ACTIVATIONS
from lmjax.models.config import ModelConfig


def train_steps(cfg: Config) -> Work | None:
    """Loss, gradient, clipping and update by AdamW; None for another optimizer or model, or one with dropout."""
    settings, model = cfg.optimizer, cfg.model
    if settings.name != "adamw" or model.dropout or model.dtype != "float32" or not is_gpt(model):
        return None
    clip = optax.identity() if settings.clip_norm is None else optax.clip_by_global_norm(settings.clip_norm)
    adamw = optax.adamw(
        settings.learning_rate, settings.b1, settings.b2, settings.eps, weight_decay=settings.weight_decay
    )
    optimizer = optax.chain(clip, adamw)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: GPT, state: Any, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[GPT, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, tokens_BT, targets_BT, model)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(jnp.asarray, initial_weights(cfg))
    state = jax.jit(optimizer.init)(params)
    data = [(jnp.asarray(batch.tokens_BT), jnp.asarray(batch.targets_BT)) for batch in batches(cfg)]

    def run(steps: int) -> float:
        nonlocal params, state
        for i in range(steps):
            params, state, value = step(params, state, *data[i % len(data)])
        jax.block_until_ready((params, state))
        return float(value)

    return run


def loss(params: GPT, tokens_BT: jax.Array, targets_BT: jax.Array, cfg: ModelConfig) -> jax.Array:
    B, T = tokens_BT.shape
    x_RD = (params.embed_VD[tokens_BT] + params.position_TD[:T]).reshape(B * T, cfg.embed)
    normed = functools.partial(normalize, epsilon=cfg.norm_epsilon)
    before = normed if cfg.norm_position == "pre" else lambda x_RD, norm: x_RD
    after = normed if cfg.norm_position == "post" else lambda x_RD, norm: x_RD
    x_RD = normed(x_RD, params.embed_norm)
    for p in params.layers:
        h_RD = before(x_RD, p.norms[0])
        y_RD = attend(B, cfg.heads, *(project(h_RD, w) for w in p.qkv))
        x_RD = after(x_RD + project(y_RD, p.output), p.norms[0])
        h_RD = ACTIVATIONS[cfg.activation](project(before(x_RD, p.norms[1]), p.up))
        x_RD = after(x_RD + project(h_RD, p.down), p.norms[1])
    logits_RV = normed(x_RD, params.final_norm) @ params.embed_VD.T
    return optax.softmax_cross_entropy_with_integer_labels(logits_RV, targets_BT.ravel()).mean()


def project(x_RI: jax.Array, p: Affine) -> jax.Array:
    return x_RI @ p.weight if p.bias is None else x_RI @ p.weight + p.bias


def normalize(x_RD: jax.Array, norm: Affine | None, epsilon: float) -> jax.Array:
    if norm is None:
        return x_RD
    centred_RD = x_RD - x_RD.mean(axis=-1, keepdims=True)
    y_RD = centred_RD * jax.lax.rsqrt(jnp.square(centred_RD).mean(axis=-1, keepdims=True) + epsilon) * norm.weight
    return y_RD if norm.bias is None else y_RD + norm.bias


def attend(B: int, heads: int, q_RD: jax.Array, k_RD: jax.Array, v_RD: jax.Array) -> jax.Array:
    q_BNTH, k_BNTH, v_BNTH = (x.reshape(B, -1, heads, x.shape[1] // heads).swapaxes(1, 2) for x in (q_RD, k_RD, v_RD))
    T = q_BNTH.shape[2]
    s_BNTS = q_BNTH @ k_BNTH.mT * q_BNTH.shape[-1] ** -0.5
    p_BNTS = jax.nn.softmax(jnp.where(np.tri(T, dtype=bool), s_BNTS, -jnp.inf), axis=-1)
    return (p_BNTS @ v_BNTH).swapaxes(1, 2).reshape(q_RD.shape)
