"""Where a token stands: rotary, sinusoidal, ALiBi. Learned positions are a table in decoder.py."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.devices.mesh import constrain, current_mesh
from lmjax.devices.rows import token_order
from lmjax.models.config import ModelConfig, RopeConfig


class Rotation(NamedTuple):
    """cos and sin of the rotary angles, [B or 1, T, 1, H/2] in float32, times what scales queries and keys."""

    cos: jax.Array
    sin: jax.Array


def rope_frequencies(cfg: RopeConfig, head_dim: int, *, local: bool) -> np.ndarray:
    """Radians per position of each pair, [H/2] (Su et al. 2021, eq. 15), with the scaling of global layers.

    llama3 (Llama 3.1 model card): wavelengths beyond original_context / low_frequency_factor are stretched by
    `factor`, those below original_context / high_frequency_factor are kept, with a linear blend between. yarn (Peng et
    al. 2023, arXiv:2309.00071, section 3.2): the same with beta_slow and beta_fast turns, blended over the pairs'
    numbers, rounded outwards as its code does.
    """
    theta = cfg.local_theta if local and cfg.local_theta else cfg.theta
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if not is_scaled(cfg, local=local):
        return frequencies
    if cfg.scaling == "linear":
        return frequencies / cfg.factor
    keep = _llama3_kept(cfg, frequencies) if cfg.scaling == "llama3" else _yarn_kept(cfg, head_dim)
    return frequencies * (keep + (1 - keep) / cfg.factor)


def is_scaled(cfg: RopeConfig, *, local: bool) -> bool:
    return cfg.scaling != "none" and not (local and cfg.local_theta)


def _llama3_kept(cfg: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    turns = cfg.original_context * frequencies / (2 * math.pi)  # within the original context
    blend = (turns - cfg.low_frequency_factor) / (cfg.high_frequency_factor - cfg.low_frequency_factor)
    return np.clip(blend, 0.0, 1.0)


def _yarn_kept(cfg: RopeConfig, head_dim: int) -> np.ndarray:
    def pair(turns: float) -> float:
        """The number of the pair that turns so often within the original context."""
        return head_dim * math.log(cfg.original_context / (turns * 2 * math.pi)) / (2 * math.log(cfg.theta))

    first = max(math.floor(pair(cfg.beta_fast)), 0)
    last = min(math.ceil(pair(cfg.beta_slow)), head_dim - 1)
    return 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)


def rope_magnitude(cfg: RopeConfig, *, local: bool) -> float:
    """What queries and keys are multiplied by when they are rotated (Peng et al. 2023, eq. 22)."""
    if cfg.scaling != "yarn" or not is_scaled(cfg, local=local):
        return 1.0
    return cfg.attention_factor or 0.1 * math.log(max(cfg.factor, 1.0)) + 1


_LARGEST_TABLE = 1 << 20
"""Angles of a row that are made part of a program."""


def rotation(positions_BT: jax.Array | np.ndarray, frequencies: np.ndarray, magnitude: float = 1.0) -> Rotation:
    """Positions that are known, a NumPy array, give constants. From traced ones XLA's CPU backend computes sines and
    cosines anew wherever they are read, which takes longer than the rotation."""
    xp = np if isinstance(positions_BT, np.ndarray) else jnp
    angles = positions_BT[..., None, None].astype(np.float32) * frequencies.astype(np.float32)
    return Rotation(*(jnp.asarray(table, jnp.float32) * magnitude for table in (xp.cos(angles), xp.sin(angles))))


def rotations(cfg: ModelConfig, positions_BT: jax.Array | None, T: int) -> dict[str, Rotation]:
    """The rotary angles of each kind of mixer, by default of a row of T tokens; none for a model without rotary
    positions."""
    if cfg.position != "rope":
        return {}
    order_BT: jax.Array | np.ndarray
    if positions_BT is not None:
        order_BT = constrain(positions_BT, "batch" if len(positions_BT) > 1 else None, "time")
    elif current_mesh() is None and T * cfg.dims["head_dim"] // 2 <= _LARGEST_TABLE:
        order_BT = np.arange(T)[None]
    else:
        order_BT = constrain(token_order(T)[None], None, "time")

    def of_kind(kind: str) -> Rotation:
        local = kind == "local"
        frequencies = rope_frequencies(cfg.rope, cfg.dims["head_dim"], local=local)
        return rotation(order_BT, frequencies, rope_magnitude(cfg.rope, local=local))

    return {kind: of_kind(kind) for kind in dict.fromkeys(cfg.pattern)}


def rotate(x_BTNH: jax.Array, by: Rotation) -> jax.Array:
    """Rotate pairs (i, i + H/2), the layout of Hugging Face checkpoints."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def sinusoidal(positions_BT: jax.Array, embed: int) -> jax.Array:
    """Fixed positions, [B, T, D] (Vaswani et al. 2017, section 3.5): sines then cosines."""
    half = (embed + 1) // 2
    frequencies = jnp.asarray(10_000.0 ** (-np.arange(half) / half), jnp.float32)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :embed]


def alibi_slopes(heads: int) -> np.ndarray:
    """The penalty per token of distance of each head, [N] (Press et al. 2021, arXiv:2108.12409, and its code).

    A geometric sequence for a power of two; otherwise the nearest lower power's, and every other one of the next.
    """
    power = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    extra = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - power) + 1, 2) / power)
    return np.concatenate([base, extra]).astype(np.float32)
