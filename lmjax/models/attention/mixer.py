"""Attention as a layer's mixer: weights, projections, positions, cache, FLOPs. The kernels are in attention.py."""

import jax
import jax.numpy as jnp

from lmjax.models import front
from lmjax.models.attention import cache as caches
from lmjax.models.attention.attention import attention
from lmjax.models.attention.scores import Mask, Score
from lmjax.models.config import LayerKind, ModelConfig
from lmjax.models.dropout import WEIGHTS_SITE, PairDropout, site_key
from lmjax.models.flops import visible_pairs
from lmjax.models.layer_inputs import LayerInputs, Mixer, Scalars
from lmjax.models.layers import norm_weights, rms_norm
from lmjax.models.linear import linear
from lmjax.models.position import alibi_slopes, rotate
from lmjax.weights import Initializer, Params, Spec, Weight, zeros


def weights(cfg: ModelConfig, into: Initializer, out: Initializer) -> Spec:
    spec: Spec = {
        "query": Weight("embed -> heads head_dim", init=into),
        "key": Weight("embed -> kv_heads head_dim", init=into),
        "value": Weight("embed -> kv_heads head_dim", init=into),
        "output": Weight("heads head_dim -> embed", init=out),
    }
    if cfg.bias or cfg.qkv_bias or cfg.attention_bias:
        spec["query_bias"] = Weight("-> heads head_dim", kind="bias", init=zeros)
        spec["key_bias"] = Weight("-> kv_heads head_dim", kind="bias", init=zeros)
        spec["value_bias"] = Weight("-> kv_heads head_dim", kind="bias", init=zeros)
    if cfg.bias or cfg.attention_bias:
        spec["output_bias"] = Weight("-> embed", kind="bias", init=zeros)
    if cfg.qk_norm:
        heads, kv_heads = ("heads ", "kv_heads ") if cfg.qk_norm_heads == "together" else ("", "")
        spec["query_norm"] = {"scale": norm_weights(cfg, f"{heads}head_dim")["scale"]}
        spec["key_norm"] = {"scale": norm_weights(cfg, f"{kv_heads}head_dim")["scale"]}
    return spec


def self_attention(
    p: Params,
    x_BTD: jax.Array,
    inputs: LayerInputs,
    cache: caches.LayerCache | None,
    cfg: ModelConfig,
    kind: LayerKind,
    layer: int | jax.Array,
) -> tuple[jax.Array, caches.LayerCache | None]:
    """Project to queries, keys and values, apply positions, attend, project back; with a cache, keys and values of
    earlier tokens come from it."""
    q_BTNH = linear(x_BTD, p["query"], p.get("query_bias"))
    k_BTKH = linear(x_BTD, p["key"], p.get("key_bias"))
    v_BTKH = linear(x_BTD, p["value"], p.get("value_bias"))
    if cfg.qk_norm:
        q_BTNH, k_BTKH = rms_norm(p["query_norm"], q_BTNH, cfg), rms_norm(p["key_norm"], k_BTKH, cfg)
    if cfg.position == "rope":
        by = inputs.rotations[kind.mixer]
        q_BTNH, k_BTKH = rotate(q_BTNH, by), rotate(k_BTKH, by)

    score = score_of(cfg, pair_dropout(inputs.keys_B, cfg, inputs.dropout_rates, layer))
    mask, prefix = Mask(cfg.window_of(kind), inputs.segments_BT), front.prefix_of(p)
    if inputs.front_1T is not None:
        positions_BT, segments_BT = inputs.positions_BT, inputs.segments_BT
        mask = Mask(mask.window, segments_BT, positions_BT, positions_BT, segments_BT, inputs.front_1T)
    if prefix is not None and cache is None:
        mask = mask._replace(positions_BT=inputs.positions_BT)
        k_BTKH, v_BTKH, mask = front.with_prefix(prefix, k_BTKH, v_BTKH, mask)
    if cache is not None:
        assert inputs.positions_BT is not None
        seen, cache = caches.extend(cache, k_BTKH, v_BTKH, inputs.positions_BT)
        k_BTKH, v_BTKH = seen.k_BKSH.swapaxes(1, 2), seen.v_BKSH.swapaxes(1, 2)
        mask = Mask(mask.window, None, inputs.positions_BT, seen.positions_BS)
    y_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, mask, score, cfg.attention)
    return linear(y_BTNH, p["output"], p.get("output_bias"), contract=2), cache


def score_of(cfg: ModelConfig, dropout: PairDropout | None) -> Score:
    return Score(
        scale=cfg.score_scale,
        softcap=cfg.attention_softcap,
        slopes_N=alibi_slopes(cfg.heads) if cfg.position == "alibi" else None,
        dropout=dropout,
    )


def pair_dropout(
    keys_B: jax.Array | None, cfg: ModelConfig, rates: Scalars, layer: int | jax.Array
) -> PairDropout | None:
    """None where nothing is dropped, as in evaluation (`keys_B` None)."""
    if keys_B is None or cfg.attention_dropout == 0:
        return None
    layer_keys_B = jax.vmap(lambda key: site_key(key, layer, WEIGHTS_SITE))(keys_B)
    return PairDropout(rates["attention_dropout"], layer_keys_B)


def empty_cache(p: Params, cfg: ModelConfig, kind: LayerKind, batch: int, length: int) -> caches.LayerCache:
    """Room for `length` tokens a row, or for those of the window where attention slides; it begins with the prefix."""
    window = cfg.window_of(kind)
    places = length if window is None else min(window, length)
    cache = caches.empty(batch, places, cfg.dims["kv_heads"], cfg.dims["head_dim"], cfg.dtype)
    if (prefix := front.prefix_of(p)) is None:
        return cache
    k_BPKH, v_BPKH = (jnp.broadcast_to(x[None], (batch, *x.shape)).astype(cfg.dtype) for x in prefix)
    positions_BP = jnp.broadcast_to(jnp.arange(k_BPKH.shape[1], dtype=jnp.int32), (batch, k_BPKH.shape[1]))
    return caches.behind_front(caches.extend(cache, k_BPKH, v_BPKH, positions_BP)[1])


def flops(cfg: ModelConfig, kind: LayerKind, T: int, *, causal: bool) -> int:
    """Scores and weighted sums: 4 N H per visible (query, key) pair."""
    return 4 * cfg.heads * cfg.dims["head_dim"] * visible_pairs(T, cfg.window_of(kind), causal=causal)


ATTENTION = Mixer("attention", weights, self_attention, empty_cache, flops)
