"""Attention: one function, several backends, each of which refuses what it cannot do instead of ignoring it.

reference  plain einsum, does everything, any device
xla        jax.nn.dot_product_attention, XLA implementation
cudnn      the same through cuDNN's flash attention: NVIDIA GPUs, 16 bit
triton     a Pallas kernel for NVIDIA GPUs that keeps documents apart
splash     a Pallas kernel for TPUs
ring       keys handed round between devices that share a row (mesh.context)

Where devices share rows, all but ring gather the row's keys and values first.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.devices.gather import per_device
from lmjax.devices.mesh import compute_capability, constrain, partition_spec, platform, shards
from lmjax.devices.rows import token_order
from lmjax.errors import ConfigError
from lmjax.models.attention import triton
from lmjax.models.attention.ring import ring
from lmjax.models.attention.scores import (
    BY_INDEX,
    HEADS,
    KV_HEADS,
    NO_DROPOUT,
    Mask,
    Score,
    by_head,
    distance,
    scores,
    visible,
    weighed,
)

_SMALLEST_BLOCK, _MOST_BLOCKS = 128, 4  # of queries, in the reference; more take longer to compile than they save


def reference(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, score: Score) -> jax.Array:
    """softmax(score(q, k)) v, in float32 between the two products (Vaswani et al. 2017, eq. 1).

    A row is cut into blocks of queries, each of which meets no keys beyond its end: most of the pairs that a causal
    mask hides are never computed.
    """
    T = q_BTNH.shape[1]
    q_BNTH, k_BKSH = by_head(q_BTNH, k_BSKH, score.scale)
    v_BKSH = v_BSKH.swapaxes(1, 2)
    if mask.positions_BT is not None:  # queries and keys may be in any order
        return _block(q_BNTH, k_BKSH, v_BKSH, mask, score, (0, 0, k_BKSH.shape[2])).swapaxes(1, 2)
    size, blocks = max(_SMALLEST_BLOCK, -(-T // _MOST_BLOCKS)), []
    for start in range(0, T, size):
        stop, first = min(start + size, T), 0 if mask.window is None else max(0, start - mask.window + 1)
        queries, keys = slice(start, stop), slice(first, stop)
        here = Mask(mask.window, None, jnp.arange(start, stop)[None], jnp.arange(first, stop)[None])
        if mask.segments_BT is not None:
            here = here._replace(segments_BT=mask.segments_BT[:, queries], key_segments_BS=mask.segments_BT[:, keys])
        part = q_BNTH[:, :, queries], k_BKSH[:, :, keys], v_BKSH[:, :, keys]
        blocks.append(_block(*part, here, score, (start, first, T)))
    y_BNTH = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=2)
    return y_BNTH.swapaxes(1, 2)


def _block(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask, score: Score, place: tuple[int, int, int]
) -> jax.Array:
    """Attention of some queries of a row, scaled already, to some of its keys. `place` is (the first of these queries,
    the first of these keys, the number of all keys of the row)."""
    s_BNTS = scores(q_BNTH, k_BKSH, mask, score)
    # softmax, divided by its sum after the product with v instead of before: fewer passes over [T, S], and none in the
    # backward pass, where the sum's gradient comes from [T, H] (Dao et al. 2022, arXiv:2205.14135, appendix B.2).
    p_BNTS = jnp.exp(s_BNTS - jax.lax.stop_gradient(jnp.max(s_BNTS, axis=-1, keepdims=True)))
    sum_BNT = jnp.sum(p_BNTS, axis=-1)
    p_BNTS = p_BNTS if score.dropout is None else score.dropout.apply(p_BNTS, *place)
    y_BNTH = weighed(p_BNTS.astype(v_BKSH.dtype), v_BKSH)
    return (y_BNTH / sum_BNT[..., None]).astype(v_BKSH.dtype)


def _refuses_nothing(q_BTNH: jax.Array, mask: Mask, score: Score) -> str | None:
    return None


def _xla(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, score: Score) -> jax.Array:
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    bias = None
    if score.slopes_N is not None:
        away_B1TS = distance(mask, T, S)[:, None].astype(q_BTNH.dtype)
        bias = -score.slopes_N[:, None, None].astype(q_BTNH.dtype) * away_B1TS
    mask_B1TS = visible(mask, T, S)[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, bias, mask_B1TS, scale=score.scale, implementation="xla"
    )


def _xla_refuses(q_BTNH: jax.Array, mask: Mask, score: Score) -> str | None:
    return "has no softcap" if score.softcap is not None else NO_DROPOUT if score.dropout is not None else None


def _cudnn(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, score: Score) -> jax.Array:
    local = functools.partial(
        jax.nn.dot_product_attention,
        scale=score.scale,
        is_causal=True,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )
    heads, kv_heads = partition_spec(HEADS), partition_spec(KV_HEADS)
    return per_device(local, (heads, kv_heads, kv_heads), heads)(q_BTNH, k_BSKH, v_BSKH)


def _cudnn_refuses(q_BTNH: jax.Array, mask: Mask, score: Score) -> str | None:
    H, limit = q_BTNH.shape[-1], 256 if compute_capability() >= (9, 0) else 128
    checks = {
        "needs an NVIDIA GPU": platform() != "gpu" or compute_capability() == (0, 0),
        f"needs a head size divisible by 8, at most {limit} on this GPU, not {H}": H % 8 > 0 or limit < H,
        f"computes in 16 bit, not {q_BTNH.dtype}: set model.dtype=bfloat16": q_BTNH.dtype.itemsize != 2,
        "has no softcap": score.softcap is not None,
        "has no ALiBi": score.slopes_N is not None,
        NO_DROPOUT: score.dropout is not None,
        "cannot keep documents apart": mask.segments_BT is not None,
        BY_INDEX: mask.key_positions_BS is not None,
    }
    return next((reason for reason, holds in checks.items() if holds), None)


_SPLASH_BLOCK = 128


def _splash(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, score: Score) -> jax.Array:
    def local(q_BTNH, k_BSKH, v_BSKH, segments_BT):
        kernel = _splash_kernel(q_BTNH.shape[1], q_BTNH.shape[2], mask.window, score.softcap)
        q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH * score.scale, k_BSKH, v_BSKH))
        return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments_BT).swapaxes(1, 2)

    heads, kv_heads = partition_spec(HEADS), partition_spec(KV_HEADS)
    in_specs = (heads, kv_heads, kv_heads, partition_spec(("batch", None)))
    return per_device(local, in_specs, heads)(q_BTNH, k_BSKH, v_BSKH, _splash_segments(mask.segments_BT))


def _splash_segments(segments_BT: jax.Array | None):
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return None if segments_BT is None else SegmentIds(q=segments_BT, kv=segments_BT)


def _splash_kernel(T: int, heads: int, window: int | None, cap: float | None) -> Callable[..., jax.Array]:
    """Off TPU the kernel is interpreted. Its block tables are costly to make; the library remembers the last few."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (T, T)
    one = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([one] * heads),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=platform() != "tpu",
    )


def _splash_refuses(q_BTNH: jax.Array, mask: Mask, score: Score) -> str | None:
    if score.slopes_N is not None or score.dropout is not None:
        return "has no ALiBi" if score.dropout is None else NO_DROPOUT
    if mask.key_positions_BS is not None:
        return BY_INDEX
    if q_BTNH.shape[1] % _SPLASH_BLOCK:
        return f"needs a sequence length divisible by {_SPLASH_BLOCK}, not {q_BTNH.shape[1]}"
    return None


def _ring_refuses(q_BTNH: jax.Array, mask: Mask, score: Score) -> str | None:
    if score.slopes_N is not None or score.dropout is not None:
        return "has no ALiBi" if score.dropout is None else NO_DROPOUT
    return BY_INDEX if mask.key_positions_BS is not None else None


class Backend(NamedTuple):
    attend: Callable[[jax.Array, jax.Array, jax.Array, Mask, Score], jax.Array]
    refuses: Callable[[jax.Array, Mask, Score], str | None]


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference, _refuses_nothing),
    "xla": Backend(_xla, _xla_refuses),
    "cudnn": Backend(_cudnn, _cudnn_refuses),
    "triton": Backend(triton.triton, triton.refuses),
    "splash": Backend(_splash, _splash_refuses),
    "ring": Backend(ring, _ring_refuses),
}
FASTEST = {"tpu": ("splash",), "gpu": ("cudnn", "triton")}


class Choice(NamedTuple):
    backend: str
    passed_over: dict[str, str]
    """The faster backends that cannot do what is asked, with what they lack."""


def choose(q_BTNH: jax.Array, mask: Mask, score: Score, backend: str = "auto") -> Choice:
    """The backend for what is asked: of `auto` the fastest on this platform that does not refuse. Shapes are enough.

    Decoding from a cache always uses the reference: one query per row leaves a kernel nothing to save.
    """
    if mask.key_positions_BS is not None:
        return Choice("reference", {})
    if backend != "auto":
        return Choice(backend, {})
    passed_over: dict[str, str] = {}
    for name in ("ring",) if shards("time") > 1 else FASTEST.get(platform(), ()):
        refusal = BACKENDS[name].refuses(q_BTNH, mask, score)
        if refusal is None:
            return Choice(name, passed_over)
        passed_over[name] = refusal
    return Choice("reference", passed_over)


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, score: Score, backend: str = "auto"
) -> jax.Array:
    """Attend from every query to the keys its mask shows -> [B, T, N, H].

    Raises ConfigError when a named backend cannot do what is asked.
    """
    backend = choose(q_BTNH, mask, score, backend).backend
    if backend != "ring" and shards("time") > 1:
        k_BSKH, v_BSKH, mask = _gather_rows(k_BSKH, v_BSKH, mask)
    refusal = BACKENDS[backend].refuses(q_BTNH, mask, score)
    if refusal is not None:
        raise ConfigError(f"model.attention={backend} {refusal}; model.attention=reference does everything")
    return BACKENDS[backend].attend(q_BTNH, k_BSKH, v_BSKH, mask, score)


def _gather_rows(k_BTKH: jax.Array, v_BTKH: jax.Array, mask: Mask) -> tuple[jax.Array, jax.Array, Mask]:
    """Keys and values of all devices that share a row; tokens are then told apart by their places in the row."""
    assert mask.key_positions_BS is None
    order_1S = token_order(k_BTKH.shape[1])[None]
    segments_BS = None if mask.segments_BT is None else constrain(mask.segments_BT, "batch", None)
    mask = Mask(mask.window, mask.segments_BT, constrain(order_1S, None, "time"), order_1S, segments_BS)
    return constrain(k_BTKH, *KV_HEADS), constrain(v_BTKH, *KV_HEADS), mask
