"""What `speed.py` measures lmjax against, too: a GPT written out by hand in plain JAX, tuned for one device.

It has the shape and the form of `torch_peer.GPT`. Activations are kept as [B*T, D], so that every weight's gradient is
a product of two matrices; layers are unrolled; the state is donated. No dropout, no finite gate, no metrics.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.config import Config
from lmjax.models.activations import ACTIVATIONS
from lmjax.models.config import ModelConfig


def train_steps(cfg: Config) -> Callable[[int], None] | None:
    """Loss, gradient, clipping and update by AdamW; None for another optimizer or a model with dropout."""
    settings, B, T = cfg.optimizer, cfg.train.batch, cfg.data.seq_len
    if settings.name != "adamw" or cfg.model.dropout or cfg.model.dtype != "float32":
        return None
    clip = optax.clip_by_global_norm(settings.clip_norm or float("inf"))
    adamw = optax.adamw(1e-4, settings.b1, settings.b2, settings.eps, weight_decay=settings.weight_decay)
    optimizer = optax.chain(clip, adamw)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, row_BU: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, row_BU, cfg.model)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params = start(cfg.model)
    state = jax.jit(optimizer.init)(params)
    rows = jnp.asarray(np.random.default_rng(0).integers(cfg.model.dims["vocab"], size=(8, B, T + 1), dtype=np.int32))

    def run(steps: int) -> None:
        nonlocal params, state
        for i in range(steps):
            params, state, value = step(params, state, rows[i % len(rows)])
        jax.block_until_ready((params, state, value))

    return run


def start(cfg: ModelConfig) -> Any:
    D, F, rng = cfg.embed, cfg.mlp, np.random.default_rng(0)

    def matrix(*shape: int) -> jax.Array:
        return jnp.asarray(0.02 * rng.standard_normal(shape, np.float32))

    def norm() -> tuple[jax.Array, jax.Array]:
        return jnp.ones(D), jnp.zeros(D)

    layers = [
        {
            "norms": (norm(), norm()),
            "qkv": matrix(3, D, D),
            "output": matrix(D, D),
            "up": matrix(D, F),
            "down": matrix(F, D),
        }
        for _ in range(cfg.layers)
    ]
    return {"embed": matrix(cfg.dims["vocab"], D), "position": matrix(cfg.context, D), "norm": norm(), "layers": layers}


def loss(params: Any, row_BU: jax.Array, cfg: ModelConfig) -> jax.Array:
    tokens_BT, targets_R = row_BU[:, :-1], row_BU[:, 1:].ravel()
    B, T = tokens_BT.shape
    x_RD = (params["embed"][tokens_BT] + params["position"][:T]).reshape(B * T, cfg.embed)
    for p in params["layers"]:
        h_RD = normalize(x_RD, *p["norms"][0])
        q_RD, k_RD, v_RD = (h_RD @ w_DD for w_DD in p["qkv"])
        x_RD += attend(q_RD, k_RD, v_RD, B, cfg.heads) @ p["output"]
        h_RD = normalize(x_RD, *p["norms"][1])
        x_RD += ACTIVATIONS[cfg.activation](h_RD @ p["up"]) @ p["down"]
    logits_RV = normalize(x_RD, *params["norm"]) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits_RV, targets_R).mean()


def normalize(x_RD: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    centred_RD = x_RD - x_RD.mean(axis=-1, keepdims=True)
    return centred_RD * jax.lax.rsqrt(jnp.square(centred_RD).mean(axis=-1, keepdims=True) + 1e-5) * scale + shift


def attend(q_RD: jax.Array, k_RD: jax.Array, v_RD: jax.Array, B: int, heads: int) -> jax.Array:
    q_BNTH, k_BNTH, v_BNTH = (x.reshape(B, -1, heads, x.shape[1] // heads).swapaxes(1, 2) for x in (q_RD, k_RD, v_RD))
    T = q_BNTH.shape[2]
    s_BNTS = q_BNTH @ k_BNTH.mT * q_BNTH.shape[-1] ** -0.5
    p_BNTS = jax.nn.softmax(jnp.where(np.tri(T, dtype=bool), s_BNTS, -jnp.inf), axis=-1)
    return (p_BNTS @ v_BNTH).swapaxes(1, 2).reshape(q_RD.shape)
