"""Attention on NVIDIA GPUs where documents share rows: a kernel of jax's, in Pallas, that Triton compiles.

It computes all pairs of a causal mask block by block, never holds them, and adds up in a fixed order, so that its bits
are the same every time. cuDNN has a form for documents, too, which is not used: it takes so many of them per row and no
more, its backward pass adds up in any order, and jax 0.10.2 gives it the offsets of keys wrong where heads share them
(jax-ml/jax#39521).
"""

import jax
import jax.numpy as jnp

from lmjax.devices.gather import per_device
from lmjax.devices.mesh import compute_capability, partition_spec, platform
from lmjax.models.attention.scores import BY_INDEX, HEADS, KV_HEADS, NO_DROPOUT, Mask, Score

_BLOCK, _SMALL_BLOCK = 64, 32  # queries or keys at a time: what fits in the 99 KiB that every GPU from 8.0 on has


def triton(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, score: Score) -> jax.Array:
    """Off GPU the kernel is interpreted."""
    from jax.experimental.pallas.ops.gpu import attention as kernel

    back = _BLOCK if q_BTNH.shape[-1] <= 64 else _SMALL_BLOCK
    blocks = kernel.BlockSizes(_BLOCK, _BLOCK, back, back, back, back)

    def local(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        group = q_BTNH.shape[2] // k_BSKH.shape[2]
        k_BSNH, v_BSNH = (jnp.repeat(x, group, axis=2) for x in (k_BSKH, v_BSKH))
        y_BTNH: jax.Array = kernel.mha(
            q_BTNH,
            k_BSNH,
            v_BSNH,
            segments_BT,
            sm_scale=score.scale,
            causal=True,
            block_sizes=blocks,
            interpret=platform() != "gpu",
        )
        return y_BTNH

    heads, kv_heads = partition_spec(HEADS), partition_spec(KV_HEADS)
    in_specs = (heads, kv_heads, kv_heads, partition_spec(("batch", None)))
    return per_device(local, in_specs, heads)(q_BTNH, k_BSKH, v_BSKH, mask.segments_BT)


def refuses(q_BTNH: jax.Array, mask: Mask, score: Score) -> str | None:
    T, H, on_gpu = q_BTNH.shape[1], q_BTNH.shape[-1], platform() == "gpu"
    checks = {
        "needs an NVIDIA GPU of compute capability 8.0 or later": on_gpu and compute_capability() < (8, 0),
        f"computes in 16 bit, not {q_BTNH.dtype}: set model.dtype=bfloat16": on_gpu and q_BTNH.dtype.itemsize != 2,
        f"needs a head size from 16 to 128, divisible by 8, not {H}": not 16 <= H <= 128 or H % 8 > 0,
        f"needs a sequence length divisible by {_BLOCK}, not {T}": T % _BLOCK > 0,
        "has no window: model.window": mask.window is not None,
        "has no softcap": score.softcap is not None,
        "has no ALiBi": score.slopes_N is not None,
        NO_DROPOUT: score.dropout is not None,
        BY_INDEX: mask.key_positions_BS is not None,
    }
    return next((reason for reason, holds in checks.items() if holds), None)
