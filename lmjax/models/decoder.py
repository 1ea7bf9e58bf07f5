"""The decoder: weights declared, then read by one block that serves training and decoding.

`weights(cfg)` says what there is, `hidden` and `unembed` are pure functions of it. Layers are segments of repeated
periods, their weights stacked on a leading `layers` axis and run by `jax.lax.scan`; `unstack` them once and the same
block runs in a plain loop, which decodes faster.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.devices.mesh import constrain, shards
from lmjax.devices.rows import token_order
from lmjax.errors import ConfigError
from lmjax.models.activations import softcap
from lmjax.models.config import LayerKind, ModelConfig, Segments, dominant, layer_index
from lmjax.models.context import Context, Scalars
from lmjax.models.dropout import EMBED_SITE, MIXER_SITE, MLP_SITE, RATES, dropout
from lmjax.models.layers import lookup, lookup_tokens, norm, norm_weights
from lmjax.models.linear import linear
from lmjax.models.mixers import MIXERS
from lmjax.models.mlp import mlp, mlp_weights
from lmjax.models.model import Cache, Model
from lmjax.models.moe import moe
from lmjax.models.pipeline import pipelined
from lmjax.models.position import rotations, sinusoidal
from lmjax.models.read import cast, dense, head, read
from lmjax.models.remat import REMAT
from lmjax.parametrization import parametrize, stream_factor
from lmjax.weights import (
    Initializer,
    Params,
    Spec,
    Weight,
    bind,
    fan_in,
    initialize,
    map_weights,
    normal,
    stacked,
    times,
)


def build(cfg: ModelConfig, *, microbatches: int | None = None) -> Model:
    """The model of a config whose vocabulary is known. `microbatches` are those of a pipeline of its layers."""
    if cfg.vocab is None:
        raise ConfigError("model.vocab is not set; give it, or let the data set's manifest fill it in")
    spec = weights(cfg)
    return Model(
        spec=spec,
        hidden=functools.partial(hidden, spec=spec, cfg=cfg, microbatches=microbatches),
        unembed=functools.partial(unembed, spec=spec, cfg=cfg),
        start=functools.partial(start, cfg=cfg),
        scalars=scalars(cfg),
        head=functools.partial(head, spec, names=("embed",) if cfg.tied else ("unembed",)),
        empty_cache=functools.partial(empty_cache, cfg),
        unstack=functools.partial(unstack, spec=spec, segments=cfg.segments),
        mixing_flops=functools.partial(mixing_flops, cfg),
        auxiliary=moe.auxiliary(cfg.moe),
        after_update=functools.partial(moe.after_update, cfg=cfg.moe),
    )


def scalars(cfg: ModelConfig) -> dict[str, float]:
    """What a sweep may vary without another program: a train step reads the same names from its hyperparameters."""
    return {
        "dropout": cfg.dropout,
        "attention_dropout": cfg.attention_dropout,
        "embed_dropout": cfg.embed_dropout,
        "embed_init_std": cfg.embed_init_std,
        "init_std": cfg.init_std or 0.0,
        "residual_init_scale": cfg.residual_scale,
        **moe.scalars(cfg.moe),
    }


# Weights ----------------------------------------------------------------------------------------------------------


def start(key: jax.Array, stds: Scalars, *, cfg: ModelConfig) -> Params:
    """Initial values of every weight, with the standard deviations in `stds`."""
    return initialize(weights(cfg, stds), key)


def weights(cfg: ModelConfig, stds: Scalars | None = None) -> Spec:
    """Every weight of the model, bound to its sizes.

    Its initializers close over `stds`, the config's unless others are given: `start` builds the spec once more to
    draw weights, so that the standard deviations may be traced.
    """
    stds = scalars(cfg) if stds is None else stds
    table = normal(stds["embed_init_std"])
    into = fan_in if cfg.init_std is None else normal(stds["init_std"])
    out = scaled(stds["residual_init_scale"], into)
    spec: Spec = {"embed": Weight("vocab -> embed", kind="lookup", init=table, tied=cfg.tied)}
    if cfg.position == "learned":
        spec["position"] = Weight("context -> embed", kind="lookup", init=table)
    if cfg.embed_norm:
        spec["embed_norm"] = norm_weights(cfg)
    if cfg.norm_position != "post":  # a post-norm block already ends in a norm
        spec["final_norm"] = norm_weights(cfg)
    if not cfg.tied:
        spec["unembed"] = Weight("embed -> vocab", init=into)
    spec = bind(spec, cfg.dims)
    spec["segments"] = {}
    for segment, (period, repeats) in enumerate(cfg.segments):
        axis = "layers" if segment == dominant(cfg.segments) else "few_layers"  # too few to spread over a pipeline
        spec["segments"][str(segment)] = {
            str(slot): stacked(bind(block_weights(cfg, kind, into, out), cfg.dims), repeats, axis)
            for slot, kind in enumerate(period)
        }
    return parametrize(cfg.parametrization, spec, cfg.growth, cfg.depth)


def scaled(scale: Any, start: Initializer) -> Initializer:
    return lambda key, weight: scale * start(key, weight)


def block_weights(cfg: ModelConfig, kind: LayerKind, into: Initializer, out: Initializer) -> Spec:
    """Of one layer. `into` starts matrices that read the residual stream, `out` those that write to it."""
    mixer = MIXERS[kind.mixer]
    block: Spec = {mixer.name: mixer.weights(cfg, into, out)}
    if kind.mlp == "moe":
        block["moe"] = moe.weights(cfg, into, out)
    else:
        block["mlp"] = mlp_weights(cfg, into, out)
    for part in (mixer.name, "mlp"):
        if cfg.norm_position in ("pre", "pre_and_output"):
            block[f"{part}_norm"] = norm_weights(cfg)
        if cfg.norm_position != "pre":
            block[f"{part}_output_norm"] = norm_weights(cfg)
    return block


# The block --------------------------------------------------------------------------------------------------------


def block(
    p: Params, x_BTD: jax.Array, context: Context, cache: Any, cfg: ModelConfig, kind: LayerKind, layer: int | jax.Array
) -> tuple[jax.Array, Any, moe.Tally | None]:
    """One layer: a mixer, then mlp or mixture of experts, each added to the residual stream."""
    mixer = MIXERS[kind.mixer]
    h_BTD = read_stream(p, mixer.name, x_BTD, cfg)
    h_BTD, cache = mixer.mix(p[mixer.name], h_BTD, context, cache, cfg, kind, layer)
    x_BTD = add_to_stream(p, mixer.name, x_BTD, h_BTD, context, cfg, layer, MIXER_SITE)

    h_BTD, tally = read_stream(p, "mlp", x_BTD, cfg), None
    if kind.mlp == "dense":
        h_BTD = mlp(p["mlp"], h_BTD, cfg)
    else:
        h_BTD, tally = moe.mixture(p["moe"], h_BTD, context.real_BT, cfg, training=context.keys_B is not None)
    return add_to_stream(p, "mlp", x_BTD, h_BTD, context, cfg, layer, MLP_SITE), cache, tally


def read_stream(p: Params, part: str, x_BTD: jax.Array, cfg: ModelConfig) -> jax.Array:
    """What a part of a layer sees of the residual stream."""
    h_BTD = norm(p[f"{part}_norm"], x_BTD, cfg) if cfg.norm_position in ("pre", "pre_and_output") else x_BTD
    return constrain(h_BTD, "batch", "time", None)


def add_to_stream(
    p: Params,
    part: str,
    x_BTD: jax.Array,
    h_BTD: jax.Array,
    context: Context,
    cfg: ModelConfig,
    layer: int | jax.Array,
    site: int,
) -> jax.Array:
    """The residual stream with what a part of a layer gives."""
    h_BTD = constrain(h_BTD, "batch", "residual_time", None)
    if cfg.norm_position in ("output", "pre_and_output"):
        h_BTD = norm(p[f"{part}_output_norm"], h_BTD, cfg)
    if cfg.dropout:
        h_BTD = dropout(h_BTD, context.keys_B, context.rates["dropout"], layer, site)
    x_BTD = x_BTD + times(h_BTD, stream_factor(cfg.parametrization, cfg.depth))
    return norm(p[f"{part}_output_norm"], x_BTD, cfg) if cfg.norm_position == "post" else x_BTD


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
    hyper: Scalars | None = None,
    cache: Cache = None,
    microbatches: int | None = None,
) -> tuple[jax.Array, Cache, dict[str, Any]]:
    """Tokens -> (last activations x_BTD, the cache with these tokens added, metrics of the layers).

    `positions_BT` (default 0, 1, ...) place tokens for rotary, learned and sinusoidal positions; with a cache they are
    needed, and negative ones mark padding. `segments_BT` keep documents from seeing each other. `keys_B`, one per
    sample, mean training: they turn dropout, at the rates in `hyper` (default: the config's), and the capacity of
    experts on. `microbatches` are those of a pipeline (default: one per stage).
    """
    T = tokens_BT.shape[1]
    if cache is None and cfg.position == "learned" and cfg.context < T:
        raise ConfigError(f"a sequence of {T} tokens is longer than the position table: model.context={cfg.context}")
    where_BT = token_order(T)[None] if positions_BT is None else positions_BT
    real_BT = constrain(jnp.broadcast_to(where_BT >= 0, tokens_BT.shape), "batch", "time")
    rates = {name: (scalars(cfg) if hyper is None else hyper)[name] for name in RATES}
    context = Context(rotations(cfg, where_BT), positions_BT, real_BT, segments_BT, keys_B, rates)
    x_BTD = embed_tokens(params, tokens_BT, where_BT, context, spec, cfg)
    new_cache, tallies = [], {}
    for segment in range(len(cfg.segments)):
        old = None if cache is None else cache[segment]
        x_BTD, new, tallies[str(segment)] = run_segment(params, x_BTD, context, old, spec, cfg, segment, microbatches)
        new_cache.append(new)
    if cfg.norm_position != "post":
        x_BTD = norm(read(spec["final_norm"], params["final_norm"], cfg.dtype), x_BTD, cfg)
    x_BTD = constrain(x_BTD, "batch", "time", None)
    return x_BTD, (None if cache is None else new_cache), moe.metrics(tallies, real_BT, cfg.moe)


def embed_tokens(
    params: Params, tokens_BT: jax.Array, where_BT: jax.Array, context: Context, spec: Spec, cfg: ModelConfig
) -> jax.Array:
    table_VD = dense(spec["embed"], params["embed"])
    x_BTD = lookup_tokens(table_VD, tokens_BT, cfg.dtype) * jnp.asarray(cfg.embed_scale, cfg.dtype)
    where_BT = constrain(where_BT, "batch" if len(where_BT) > 1 else None, "residual_time")
    if cfg.position == "learned":
        # In float32, since the gradient of a position is a sum over the batch.
        position_SD = read(spec["position"], params["position"], cfg.dtype)
        x_BTD = (x_BTD + lookup(position_SD, where_BT, jnp.float32)).astype(cfg.dtype)
    if cfg.position == "sinusoidal":
        x_BTD = x_BTD + sinusoidal(where_BT, cfg.embed).astype(cfg.dtype)
    if cfg.embed_norm:
        x_BTD = norm(read(spec["embed_norm"], params["embed_norm"], cfg.dtype), x_BTD, cfg)
    if cfg.embed_dropout:
        x_BTD = dropout(x_BTD, context.keys_B, context.rates["embed_dropout"], 0, EMBED_SITE)
    return x_BTD


# Segments ---------------------------------------------------------------------------------------------------------

Period = Callable[[Context, jax.Array, Any], tuple[jax.Array, Any]]
"""(context, x_BTD, (params of one period, its number, its caches)) -> (x_BTD, (new caches, tallies by slot))"""


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
    """All repeats of one period -> (x_BTD, its new caches, what experts did by slot, with the repeats in front).

    Unstacked weights run in a loop, stacked ones in a scan; where the mesh has pipeline stages, those of the dominant
    segment run from stage to stage.
    """
    layers = params["segments"][str(segment)]
    period = layers_of(spec["segments"][str(segment)], cfg, segment)
    if isinstance(layers, list):
        return looped(period, context, x_BTD, layers, cache)
    assert cache is None, "decoding runs over unstacked weights: model.unstack(params)"
    scan = functools.partial(scanned, REMAT[cfg.remat], cfg.unroll, period)
    if shards("layers") > 1 and segment == dominant(cfg.segments):
        x_BTD, tallies = pipelined(scan, context, x_BTD, layers, microbatches)
    else:
        x_BTD, tallies = scan(context, x_BTD, layers, 0)
    return x_BTD, None, tallies


def layers_of(spec: Spec, cfg: ModelConfig, segment: int) -> Period:
    """One period of a segment, whose stacked weights are declared by `spec`."""
    kinds, layer_spec = cfg.segments[segment][0], map_weights(Weight.of_layer, spec)

    def period(context: Context, x_BTD: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
        stored, repeat, old_caches = inputs
        p = read(layer_spec, stored, cfg.dtype)
        new_caches, tallies = [], {}
        for slot, kind in enumerate(kinds):
            layer = layer_index(cfg.segments, segment, repeat, slot)
            old = None if old_caches is None else old_caches[slot]
            x_BTD, new, tally = block(p[str(slot)], x_BTD, context, old, cfg, kind, layer)
            new_caches.append(new)
            if tally is not None:
                tallies[str(slot)] = tally
        return x_BTD, (None if old_caches is None else new_caches, tallies)

    return period


def looped(
    period: Period, context: Context, x_BTD: jax.Array, layers: list[Params], caches: list[Any] | None
) -> tuple[jax.Array, list[Any], dict[str, moe.Tally]]:
    new_caches, tallies = [], []
    for repeat, p in enumerate(layers):
        old = None if caches is None else caches[repeat]
        x_BTD, (new, tally) = period(context, x_BTD, (p, repeat, old))
        new_caches.append(new)
        tallies.append(tally)
    return x_BTD, new_caches, jax.tree.map(lambda *repeats: jnp.stack(repeats), *tallies)


def scanned(
    remat: Callable[..., Any],
    unroll: float,
    period: Period,
    context: Context,
    x_BTD: jax.Array,
    layers: Params,
    first: int | jax.Array,
) -> tuple[jax.Array, dict[str, moe.Tally]]:
    """`first` is the number of the first of these repeats in the segment."""
    repeats = len(jax.tree.leaves(layers)[0])
    xs = (layers, first + jnp.arange(repeats), None)
    body = remat(functools.partial(period, context))
    x_BTD, (_, tallies) = jax.lax.scan(body, x_BTD, xs, unroll=max(1, round(unroll * repeats)))
    return x_BTD, tallies


# The ends ---------------------------------------------------------------------------------------------------------


def unembed(params: Params, x: jax.Array, *, spec: Spec, cfg: ModelConfig) -> jax.Array:
    """x[..., D] -> float32 logits[..., V]. On a mesh `params` are gathered."""
    name = "unembed" if "unembed" in params else "embed"
    weight: Weight = spec["embed" if cfg.tied else "unembed"]
    w = dense(weight, params[name])
    w_DV = cast(weight, w if name == "unembed" else w.T, cfg.dtype)
    logits = linear(times(x, weight.scaling.logits), w_DV, dtype=jnp.float32)
    return softcap(logits, cfg.logit_softcap)


def empty_cache(cfg: ModelConfig, batch: int, length: int) -> Cache:
    """Room for `length` tokens a row, for unstacked weights."""

    def layer(kind: LayerKind) -> Any:
        return MIXERS[kind.mixer].empty_cache(cfg, kind, batch, length)

    return [[[layer(kind) for kind in period] for _ in range(repeats)] for period, repeats in cfg.segments]


def mixing_flops(cfg: ModelConfig, T: int, *, causal: bool) -> int:
    """Forward FLOPs between the activations of one row of T tokens, in all mixers."""
    return sum(MIXERS[kind.mixer].flops(cfg, kind, T, causal=causal) for kind in cfg.kinds)


def unstack(params: Params, *, spec: Spec, segments: Segments) -> Params:
    """The same params with each segment a list of layers, for a loop instead of a scan.

    On CPU a tied head becomes a matrix of its own, laid out as it is multiplied: 1.4x on the head for small batches.
    """

    def layer(segment: int, repeat: int) -> Params:
        return jax.tree.map(lambda w: w[repeat], params["segments"][str(segment)])

    unstacked = {str(s): [layer(s, i) for i in range(repeats)] for s, (_, repeats) in enumerate(segments)}
    own_head = "unembed" not in params and jax.default_backend() == "cpu"
    head = {"unembed": dense(spec["embed"], params["embed"]).T} if own_head else {}
    return {**params, **head, "segments": unstacked}
