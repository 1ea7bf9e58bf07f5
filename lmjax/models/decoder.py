"""The decoder: weights declared, then read by one block that serves training and decoding.

`weights(cfg)` says what there is, `hidden` and `unembed` are pure functions of it. Layers are segments of repeated
periods, their weights stacked on a leading `layers` axis and run by `jax.lax.scan`; `unstack` them once and the same
block runs in a plain loop, which decodes faster.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.devices.gather import gather
from lmjax.devices.mesh import constrain, shards
from lmjax.devices.rows import token_order
from lmjax.errors import ConfigError
from lmjax.models.activations import softcap
from lmjax.models.attention import cache as caches
from lmjax.models.attention.attention import Mask, Score, attention
from lmjax.models.config import AttentionKind, LayerKind, ModelConfig, Segments, dominant, layer_index
from lmjax.models.dropout import PairDropout, dropout, site_key
from lmjax.models.flops import attention_flops
from lmjax.models.layers import lookup, lookup_tokens, norm, norm_weights, rms_norm
from lmjax.models.linear import linear
from lmjax.models.mlp import mlp, mlp_weights
from lmjax.models.model import Cache, Model
from lmjax.models.moe import moe
from lmjax.models.pipeline import pipelined
from lmjax.models.position import (
    Rotation,
    alibi_slopes,
    rope_frequencies,
    rope_magnitude,
    rotate,
    rotation,
    sinusoidal,
)
from lmjax.models.remat import REMAT
from lmjax.weights import Initializer, Params, Spec, Weight, bind, fan_in, map_weights, normal, stacked, zeros

EMBED_SITE, ATTENTION_SITE, MLP_SITE, WEIGHTS_SITE = 0, 1, 2, 3  # where dropout acts: part of a mask's name


def build(cfg: ModelConfig, *, microbatches: int | None = None) -> Model:
    """The model of a config whose vocabulary is known. `microbatches` are those of a pipeline of its layers."""
    if cfg.vocab is None:
        raise ConfigError("model.vocab is not set; give it, or let the data set's manifest fill it in")
    spec = weights(cfg)
    return Model(
        spec=spec,
        hidden=functools.partial(hidden, spec=spec, cfg=cfg, microbatches=microbatches),
        unembed=functools.partial(unembed, cfg=cfg),
        head=("embed",) if cfg.tied else ("unembed",),
        empty_cache=functools.partial(empty_cache, cfg),
        unstack=functools.partial(unstack, segments=cfg.segments),
        attention_flops=functools.partial(attention_flops, cfg),
        auxiliary=moe.loss_weights(cfg.moe),
        settle=functools.partial(moe.settle, cfg=cfg.moe),
    )


# Weights ----------------------------------------------------------------------------------------------------------


def weights(cfg: ModelConfig) -> Spec:
    """Every weight of the model, bound to its sizes."""
    table = normal(cfg.embed_init_std)
    spec: Spec = {"embed": Weight("vocab -> embed", kind="lookup", init=table, tied=cfg.tied)}
    if cfg.position == "learned":
        spec["position"] = Weight("context -> embed", kind="lookup", init=table)
    if cfg.embed_norm:
        spec["embed_norm"] = norm_weights(cfg)
    if cfg.norm_position != "post":  # a post-norm block already ends in a norm
        spec["final_norm"] = norm_weights(cfg)
    if not cfg.tied:
        spec["unembed"] = Weight("embed -> vocab", init=into_initializer(cfg))
    spec = bind(spec, cfg.dims)
    spec["segments"] = {}
    for segment, (period, repeats) in enumerate(cfg.segments):
        axis = "layers" if segment == dominant(cfg.segments) else "few_layers"  # too few to spread over a pipeline
        spec["segments"][str(segment)] = {
            str(slot): stacked(bind(block_weights(cfg, kind), cfg.dims), repeats, axis)
            for slot, kind in enumerate(period)
        }
    return spec


def into_initializer(cfg: ModelConfig) -> Initializer:
    return fan_in if cfg.init_std is None else normal(cfg.init_std)


def out_initializer(cfg: ModelConfig) -> Initializer:
    """Matrices that write to the residual stream start smaller, so that 2 L of them add up to its size (GPT-2)."""
    scale = (2 * cfg.layers) ** -0.5 if cfg.residual_init_scale is None else cfg.residual_init_scale
    start = into_initializer(cfg)
    return lambda key, weight: scale * start(key, weight)


def block_weights(cfg: ModelConfig, kind: LayerKind) -> Spec:
    into, out = into_initializer(cfg), out_initializer(cfg)
    block: Spec = {"attention": attention_weights(cfg, into, out)}
    if kind.mlp == "moe":
        block["moe"] = moe.weights(cfg, into, out)
    else:
        block["mlp"] = mlp_weights(cfg, into, out)
    for part in ("attention", "mlp"):
        if cfg.norm_position in ("pre", "pre_and_output"):
            block[f"{part}_norm"] = norm_weights(cfg)
        if cfg.norm_position != "pre":
            block[f"{part}_output_norm"] = norm_weights(cfg)
    return block


def attention_weights(cfg: ModelConfig, into: Initializer, out: Initializer) -> Spec:
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


# The block --------------------------------------------------------------------------------------------------------


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    rotations: dict[AttentionKind, Rotation]
    positions_BT: jax.Array | None
    real_BT: jax.Array
    """Which tokens are not padding."""
    segments_BT: jax.Array | None
    keys_B: jax.Array | None


def block(
    p: Params,
    x_BTD: jax.Array,
    context: Context,
    cache: caches.LayerCache | None,
    cfg: ModelConfig,
    kind: LayerKind,
    layer: int | jax.Array,
) -> tuple[jax.Array, caches.LayerCache | None, moe.Tally | None]:
    """One layer: attention, then mlp or mixture of experts, each added to the residual stream."""
    tally = None

    def residual(part: str, site: int, x_BTD: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        h_BTD = norm(p[f"{part}_norm"], x_BTD, cfg) if cfg.norm_position in ("pre", "pre_and_output") else x_BTD
        h_BTD = function(constrain(h_BTD, "batch", "time", None))
        h_BTD = constrain(h_BTD, "batch", "residual_time", None)
        if cfg.norm_position in ("output", "pre_and_output"):
            h_BTD = norm(p[f"{part}_output_norm"], h_BTD, cfg)
        x_BTD = x_BTD + dropout(h_BTD, context.keys_B, cfg.dropout, layer, site)
        return norm(p[f"{part}_output_norm"], x_BTD, cfg) if cfg.norm_position == "post" else x_BTD

    def attend(h_BTD: jax.Array) -> jax.Array:
        nonlocal cache
        y_BTD, cache = self_attention(p["attention"], h_BTD, context, cache, cfg, kind, layer)
        return y_BTD

    def transform(h_BTD: jax.Array) -> jax.Array:
        nonlocal tally
        if kind.mlp == "dense":
            return mlp(p["mlp"], h_BTD, cfg)
        y_BTD, tally = moe.mixture(p["moe"], h_BTD, context.real_BT, cfg, training=context.keys_B is not None)
        return y_BTD

    x_BTD = residual("attention", ATTENTION_SITE, x_BTD, attend)
    x_BTD = residual("mlp", MLP_SITE, x_BTD, transform)
    return x_BTD, cache, tally


def self_attention(
    p: Params,
    x_BTD: jax.Array,
    context: Context,
    cache: caches.LayerCache | None,
    cfg: ModelConfig,
    kind: LayerKind,
    layer: int | jax.Array,
) -> tuple[jax.Array, caches.LayerCache | None]:
    """Project, place, compare, mix; with a cache, keys and values of earlier tokens come from it."""
    q_BTNH = linear(x_BTD, p["query"], p.get("query_bias"))
    k_BTKH = linear(x_BTD, p["key"], p.get("key_bias"))
    v_BTKH = linear(x_BTD, p["value"], p.get("value_bias"))
    if cfg.qk_norm:
        q_BTNH, k_BTKH = rms_norm(p["query_norm"], q_BTNH, cfg), rms_norm(p["key_norm"], k_BTKH, cfg)
    if cfg.position == "rope":
        by = context.rotations[kind.attention]
        q_BTNH, k_BTKH = rotate(q_BTNH, by), rotate(k_BTKH, by)

    score = Score(
        scale=cfg.attention_scale or cfg.dims["head_dim"] ** -0.5,
        softcap=cfg.attention_softcap,
        slopes_N=alibi_slopes(cfg.heads) if cfg.position == "alibi" else None,
        dropout=pair_dropout(context.keys_B, cfg.attention_dropout, layer),
    )
    mask = Mask(cfg.window_of(kind), context.segments_BT)
    if cache is not None:
        assert context.positions_BT is not None
        seen, cache = caches.extend(cache, k_BTKH, v_BTKH, context.positions_BT)
        k_BTKH, v_BTKH = seen.k_BKSH.swapaxes(1, 2), seen.v_BKSH.swapaxes(1, 2)
        mask = Mask(mask.window, None, context.positions_BT, seen.positions_BS)
    y_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, mask, score, cfg.attention)
    return linear(y_BTNH, p["output"], p.get("output_bias"), contract=2), cache


def pair_dropout(keys_B: jax.Array | None, rate: float, layer: int | jax.Array) -> PairDropout | None:
    """None in evaluation, too: `keys_B` None."""
    if keys_B is None or rate == 0:
        return None
    return PairDropout(rate, jax.vmap(lambda key: site_key(key, layer, WEIGHTS_SITE))(keys_B))


# The whole --------------------------------------------------------------------------------------------------------


def hidden(
    params: Params,
    tokens_BT: jax.Array,
    *,
    spec: Spec,
    cfg: ModelConfig,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    keys_B: jax.Array | None = None,
    cache: Cache = None,
    microbatches: int | None = None,
) -> tuple[jax.Array, Cache, dict[str, Any]]:
    """Tokens -> (last activations x_BTD, the cache with these tokens added, metrics of the layers).

    `positions_BT` (default 0, 1, ...) place tokens for rotary, learned and sinusoidal positions; with a cache they are
    needed, and negative ones mark padding. `segments_BT` keep documents from seeing each other. `keys_B`, one per
    sample, mean training: they turn dropout and the capacity of experts on. `microbatches` are those of a pipeline
    (default: one per stage).
    """
    T = tokens_BT.shape[1]
    if cache is None and cfg.position == "learned" and cfg.context < T:
        raise ConfigError(f"a sequence of {T} tokens is longer than the position table: model.context={cfg.context}")
    where_BT = token_order(T)[None] if positions_BT is None else positions_BT
    real_BT = constrain(jnp.broadcast_to(where_BT >= 0, tokens_BT.shape), "batch", "time")
    context = Context(rotations(cfg, where_BT), positions_BT, real_BT, segments_BT, keys_B)
    x_BTD = embed_tokens(params, tokens_BT, where_BT, keys_B, cfg)
    new_cache, tallies = [], {}
    for segment in range(len(cfg.segments)):
        segment_cache = None if cache is None else cache[segment]
        x_BTD, segment_cache, tallies[str(segment)] = run_segment(
            params, x_BTD, context, segment_cache, spec, cfg, segment, microbatches
        )
        new_cache.append(segment_cache)
    if cfg.norm_position != "post":
        x_BTD = norm(gather(params["final_norm"]), x_BTD, cfg)
    x_BTD = constrain(x_BTD, "batch", "time", None)
    return x_BTD, (None if cache is None else new_cache), moe.metrics(tallies, real_BT, cfg.moe)


def embed_tokens(
    params: Params, tokens_BT: jax.Array, where_BT: jax.Array, keys_B: jax.Array | None, cfg: ModelConfig
) -> jax.Array:
    x_BTD = lookup_tokens(params["embed"], tokens_BT, cfg.dtype) * jnp.asarray(cfg.embed_scale, cfg.dtype)
    where_BT = constrain(where_BT, "batch" if len(where_BT) > 1 else None, "residual_time")
    if cfg.position == "learned":
        # In float32, since the gradient of a position is a sum over the batch.
        x_BTD = (x_BTD + lookup(gather(params["position"]), where_BT, jnp.float32)).astype(cfg.dtype)
    if cfg.position == "sinusoidal":
        x_BTD = x_BTD + sinusoidal(where_BT, cfg.embed).astype(cfg.dtype)
    if cfg.embed_norm:
        x_BTD = norm(gather(params["embed_norm"]), x_BTD, cfg)
    return dropout(x_BTD, keys_B, cfg.embed_dropout, 0, EMBED_SITE)


def rotations(cfg: ModelConfig, where_BT: jax.Array) -> dict[AttentionKind, Rotation]:
    """The rotary angles of each kind of attention."""
    if cfg.position != "rope":
        return {}
    where_BT = constrain(where_BT, "batch" if len(where_BT) > 1 else None, "time")

    def of_kind(kind: AttentionKind) -> Rotation:
        local = kind == "local"
        frequencies = rope_frequencies(cfg.rope, cfg.dims["head_dim"], local=local)
        return rotation(where_BT, frequencies, rope_magnitude(cfg.rope, local=local))

    return {kind: of_kind(kind) for kind in dict.fromkeys(cfg.pattern)}


def run_segment(
    params: Params,
    x_BTD: jax.Array,
    context: Context,
    cache: Any,
    spec: Spec,
    cfg: ModelConfig,
    segment: int,
    microbatches: int | None,
) -> tuple[jax.Array, Any, dict[str, moe.Tally]]:
    """All repeats of one period: scanned when the weights are stacked, looped over when they are unstacked.

    Where the mesh has pipeline stages, those of the dominant segment run from stage to stage.
    Returns what experts did by slot, each array with the repeats in front.
    """
    period, _ = cfg.segments[segment]
    layers = params["segments"][str(segment)]
    layer_spec = map_weights(Weight.of_layer, spec["segments"][str(segment)])

    def compute_dtype(weight: Weight, w: jax.Array) -> jax.Array:
        return w.astype(cfg.dtype) if weight.kind == "matmul" and not weight.float32 else w

    def body(context: Context, x_BTD: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        p, repeat, old_caches = inputs
        p = gather(map_weights(compute_dtype, layer_spec, p), layer_spec)
        new_caches, tallies = [], {}
        for slot, kind in enumerate(period):
            layer = layer_index(cfg.segments, segment, repeat, slot)
            old = None if old_caches is None else old_caches[slot]
            x_BTD, new, tally = block(p[str(slot)], x_BTD, context, old, cfg, kind, layer)
            new_caches.append(new)
            if tally is not None:
                tallies[str(slot)] = tally
        return x_BTD, (None if old_caches is None else new_caches, tallies)

    if isinstance(layers, list):
        inputs = [(p, i, None if cache is None else cache[i]) for i, p in enumerate(layers)]
        return _loop(functools.partial(body, context), x_BTD, inputs)
    assert cache is None, "decoding runs over unstacked weights: decoder.unstack(params)"

    def scan(context: Context, x_BTD: jax.Array, layers: Params, first: int | jax.Array) -> tuple[jax.Array, Any]:
        repeats = len(jax.tree.leaves(layers)[0])
        xs = (layers, first + jnp.arange(repeats), None)
        unroll = max(1, round(cfg.unroll * repeats))
        x_BTD, (_, tallies) = jax.lax.scan(REMAT[cfg.remat](functools.partial(body, context)), x_BTD, xs, unroll=unroll)
        return x_BTD, tallies

    if shards("layers") > 1 and segment == dominant(cfg.segments):
        x_BTD, tallies = pipelined(scan, context, x_BTD, layers, microbatches)
    else:
        x_BTD, tallies = scan(context, x_BTD, layers, 0)
    return x_BTD, None, tallies


def _loop(
    body: Callable[..., Any], x_BTD: jax.Array, xs: list[Any]
) -> tuple[jax.Array, list[Any], dict[str, moe.Tally]]:
    new_caches, tallies = [], []
    for inputs in xs:
        x_BTD, (new_cache, tally) = body(x_BTD, inputs)
        new_caches.append(new_cache)
        tallies.append(tally)
    return x_BTD, new_caches, jax.tree.map(lambda *layers: jnp.stack(layers), *tallies)


def unembed(params: Params, x: jax.Array, *, cfg: ModelConfig) -> jax.Array:
    """x[..., D] -> float32 logits[..., V]. On a mesh `params` are gathered."""
    w_DV = params["unembed"] if "unembed" in params else params["embed"].T
    logits = linear(x, w_DV.astype(cfg.dtype), dtype=jnp.float32)
    return softcap(logits, cfg.logit_softcap)


def empty_cache(cfg: ModelConfig, batch: int, length: int) -> Cache:
    """Room for `length` tokens a row (the window's size where attention slides), for unstacked weights."""
    dims = cfg.dims

    def layer(kind: LayerKind) -> caches.LayerCache:
        window = cfg.window_of(kind)
        places = length if window is None else min(window, length)
        return caches.empty(batch, places, dims["kv_heads"], dims["head_dim"], cfg.dtype)

    return [[[layer(kind) for kind in period] for _ in range(repeats)] for period, repeats in cfg.segments]


def unstack(params: Params, segments: Segments) -> Params:
    """The same params with each segment a list of layers, for a loop instead of a scan.

    On CPU a tied head becomes a matrix of its own, laid out as it is multiplied: 1.4x on the head for small batches.
    """

    def layer(segment: int, repeat: int) -> Params:
        return jax.tree.map(lambda w: w[repeat], params["segments"][str(segment)])

    unstacked = {str(s): [layer(s, i) for i in range(repeats)] for s, (_, repeats) in enumerate(segments)}
    head = {"unembed": params["embed"].T} if "unembed" not in params and jax.default_backend() == "cpu" else {}
    return {**params, **head, "segments": unstacked}
