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

from lmjax.devices.mesh import constrain, current_mesh, shards
from lmjax.devices.rows import token_order
from lmjax.errors import ConfigError
from lmjax.models import front
from lmjax.models.activations import softcap
from lmjax.models.attention import choice
from lmjax.models.attention.cache import behind_front
from lmjax.models.block import block
from lmjax.models.config import LayerKind, ModelConfig, dominant, layer_index
from lmjax.models.dropout import DROPOUTS, EMBED_SITE, dropout
from lmjax.models.float8 import in_float8
from lmjax.models.layer_inputs import LayerInputs, Scalars
from lmjax.models.layers import lookup, lookup_tokens, norm, norm_weights
from lmjax.models.linear import linear
from lmjax.models.mixers import MIXERS
from lmjax.models.mlp import mlp_weights
from lmjax.models.model import Cache, Model
from lmjax.models.moe import moe
from lmjax.models.pipeline import pipelined
from lmjax.models.position import rotations, sinusoidal
from lmjax.models.read import cast, each_array, head, read, ready_for_lookup
from lmjax.models.remat import REMAT
from lmjax.models.unstack import unstack
from lmjax.parametrization import parametrize
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
        scalars=config_scalars(cfg),
        head=functools.partial(head, spec),
        empty_cache=functools.partial(empty_cache, spec=spec, cfg=cfg),
        unstack=functools.partial(unstack, spec=spec, cfg=cfg),
        mixing_flops=functools.partial(mixing_flops, cfg),
        attends=functools.partial(choice.describe, cfg=cfg),
        auxiliary=moe.auxiliary(cfg.moe),
        after_update=functools.partial(moe.after_update, cfg=cfg.moe),
    )


def config_scalars(cfg: ModelConfig) -> dict[str, float]:
    """The config's values of `Scalars`. A train step has the same names, traced, among its hyperparameters."""
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


def start(key: jax.Array, scalars: Scalars, *, cfg: ModelConfig) -> Params:
    """Initial values of every weight. Their spreads are among the `scalars`, which may be traced."""
    return initialize(weights(cfg, scalars), key)


def weights(cfg: ModelConfig, scalars: Scalars | None = None) -> Spec:
    """Every weight of the model, bound to its sizes.

    The initializers close over the spreads in `scalars` (default: the config's). So `start`, whose scalars may be
    traced, builds a spec of its own to draw weights by.
    """
    scalars = config_scalars(cfg) if scalars is None else scalars
    table = normal(scalars["embed_init_std"])
    into = fan_in if cfg.init_std is None else normal(scalars["init_std"])
    out = scaled(scalars["residual_init_scale"], into)
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
            str(place): stacked(bind(block_weights(cfg, kind, into, out), cfg.dims), repeats, axis)
            for place, kind in enumerate(period)
        }
    return parametrize(cfg.parametrization, spec, cfg.growth, cfg.depth)


def scaled(scale: Any, init: Initializer) -> Initializer:
    return lambda key, weight: scale * init(key, weight)


def block_weights(cfg: ModelConfig, kind: LayerKind, into: Initializer, out: Initializer) -> Spec:
    """The weights of one layer. `into` initializes the matrices that read the residual stream, `out` the others."""
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
    scalars: Scalars | None = None,
    cache: Cache = None,
    microbatches: int | None = None,
) -> tuple[jax.Array, Cache, dict[str, Any]]:
    """Tokens -> (last activations x_BTD, the cache with these tokens added, metrics of the layers).

    `positions_BT` (default 0, 1, ...) place tokens for rotary, learned and sinusoidal positions; with a cache they are
    needed, and negative ones mark padding. `segments_BT` keep documents from seeing each other. `keys_B`, one per
    sample, mean training: they turn dropout, at the rates in `scalars` (default: the config's), and the capacity of
    experts on. `microbatches` are those of a pipeline (default: one per stage).
    """
    P, row, T = front.places(params), front.Row(tokens_BT, positions_BT, segments_BT), tokens_BT.shape[1]
    if cache is None and cfg.position == "learned" and cfg.context < P + T:
        raise ConfigError(
            f"a sequence of {P + T} tokens is longer than the position table: model.context={cfg.context}"
        )
    if P and cache is None and front.has_prompt(params):
        row = front.behind_prompt(params, row)
    elif P:
        positions_BT = token_order(T)[None] if positions_BT is None else positions_BT
        row = row._replace(positions_BT=front.after_front(positions_BT, P))
    x_BTD, cache, metrics = whole_rows(params, row, spec, cfg, keys_B, scalars, cache, microbatches)
    return x_BTD[:, -T:] if P else x_BTD, cache, metrics


def whole_rows(
    params: Params,
    row: front.Row,
    spec: Spec,
    cfg: ModelConfig,
    keys_B: jax.Array | None = None,
    scalars: Scalars | None = None,
    cache: Cache = None,
    microbatches: int | None = None,
) -> tuple[jax.Array, Cache, dict[str, Any]]:
    """`hidden` of rows that have in them what stands in front of their texts."""
    tokens_BT, positions_BT, segments_BT, front_1T, text_BT = row
    T = tokens_BT.shape[1]
    all_positions_BT = token_order(T)[None] if positions_BT is None else positions_BT
    real_BT = constrain(jnp.broadcast_to(all_positions_BT >= 0, tokens_BT.shape), "batch", "time")
    scalars = config_scalars(cfg) if scalars is None else scalars
    rates = {name: scalars[name] for name in DROPOUTS}
    placed = (positions_BT, real_BT, segments_BT)
    inputs = LayerInputs(rotations(cfg, positions_BT, T), *placed, keys_B, rates, front_1T, text_BT)
    x_BTD = embed_tokens(params, tokens_BT, all_positions_BT, inputs, spec, cfg)
    new_cache, tallies = [], {}
    for segment in range(len(cfg.segments)):
        old = None if cache is None else cache[segment]
        x_BTD, new, tallies[str(segment)] = run_segment(params, x_BTD, inputs, old, spec, cfg, segment, microbatches)
        new_cache.append(new)
    if cfg.norm_position != "post":
        x_BTD = norm(read(spec["final_norm"], params["final_norm"], cfg.dtype), x_BTD, cfg)
    x_BTD = constrain(x_BTD, "batch", "time", None)
    counted_BT = real_BT if text_BT is None else text_BT
    return x_BTD, (None if cache is None else new_cache), moe.metrics(tallies, counted_BT, cfg.moe)


def embed_tokens(
    params: Params,
    tokens_BT: jax.Array,
    all_positions_BT: jax.Array,
    inputs: LayerInputs,
    spec: Spec,
    cfg: ModelConfig,
) -> jax.Array:
    """The residual stream before the first layer."""
    table_VD = each_array(functools.partial(ready_for_lookup, dtype=cfg.dtype), spec["embed"], params["embed"])
    x_BTD = lookup_tokens(table_VD, tokens_BT, cfg.dtype)
    x_BTD = x_BTD if inputs.text_BT is None else front.add_prompt(table_VD, x_BTD)
    x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, cfg.dtype)
    all_positions_BT = constrain(all_positions_BT, "batch" if len(all_positions_BT) > 1 else None, "residual_time")
    if cfg.position == "learned":
        # In float32, since the gradient of a position is a sum over the batch.
        table_RD = read(spec["position"], params["position"], cfg.dtype)
        x_BTD = (x_BTD + lookup(table_RD, all_positions_BT, jnp.float32)).astype(cfg.dtype)
    if cfg.position == "sinusoidal":
        x_BTD = x_BTD + sinusoidal(all_positions_BT, cfg.embed).astype(cfg.dtype)
    if cfg.embed_norm:
        x_BTD = norm(read(spec["embed_norm"], params["embed_norm"], cfg.dtype), x_BTD, cfg)
    if cfg.embed_dropout:
        x_BTD = dropout(x_BTD, inputs.keys_B, inputs.dropout_rates["embed_dropout"], 0, EMBED_SITE)
    return x_BTD


# Segments ---------------------------------------------------------------------------------------------------------

Period = Callable[[LayerInputs, jax.Array, Any], tuple[jax.Array, Any]]
"""(inputs, x_BTD, (params of one period, its number, its caches)) -> (x_BTD, (new caches, tallies by place))

A place is where a layer stands in its period, from 0."""


def run_segment(
    params: Params,
    x_BTD: jax.Array,
    inputs: LayerInputs,
    cache: Any,
    spec: Spec,
    cfg: ModelConfig,
    segment: int,
    microbatches: int | None,
) -> tuple[jax.Array, Any, dict[str, moe.Tally]]:
    """All repeats of one period -> (x_BTD, its new caches, tallies by place, with the repeats in front).

    Unstacked weights run in a loop, stacked ones in a scan, or in two; where the mesh has pipeline stages, those of the
    dominant segment run from stage to stage.
    """
    layers = params["segments"][str(segment)]
    period = make_period(spec["segments"][str(segment)], cfg, segment)
    if isinstance(layers, list):
        return looped(period, inputs, x_BTD, layers, cache)
    assert cache is None, "decoding runs over unstacked weights: model.unstack(params)"
    scan = functools.partial(scanned, REMAT[cfg.remat], unrolled(cfg), period)
    if isinstance(layers, tuple):  # a stack that is cut: finetune/last_layers.py
        first, last = layers
        x_BTD, tallies = scan(inputs, x_BTD, first, 0)
        x_BTD, more = scan(inputs, x_BTD, last, len(jax.tree.leaves(first)[0]))
        tallies = jax.tree.map(lambda *parts: jnp.concatenate(parts), tallies, more)
    elif shards("layers") > 1 and segment == dominant(cfg.segments):
        x_BTD, tallies = pipelined(scan, inputs, x_BTD, layers, microbatches)
    else:
        x_BTD, tallies = scan(inputs, x_BTD, layers, 0)
    return x_BTD, None, tallies


_MOST_UNROLLED = 16  # layers


def unrolled(cfg: ModelConfig) -> float:
    """The fraction of a segment's repeats that the scan unrolls.

    A scan stacks what every layer keeps for its backward pass, and cuts it apart again: 1.14 to 1.2x of a step on a
    CPU. XLA merges what unrolled layers compute again with what they computed first, so with remat there is no choice.
    """
    if cfg.unroll is not None:
        return cfg.unroll
    alone = current_mesh() is None and jax.default_backend() != "tpu"
    return 1.0 if alone and cfg.remat == "none" and cfg.layers <= _MOST_UNROLLED else 0.0


def make_period(spec: Spec, cfg: ModelConfig, segment: int) -> Period:
    """The function that runs one period of a segment, whose stacked weights are declared by `spec`."""
    kinds, layer_spec = cfg.segments[segment][0], map_weights(Weight.of_layer, spec)

    def period(inputs: LayerInputs, x_BTD: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        stored, repeat, old_caches = xs
        p = read(layer_spec, stored, cfg.dtype)
        if cfg.matmul == "float8" and inputs.keys_B is not None:
            p = in_float8(layer_spec, p)
        new_caches, tallies = [], {}
        for place, kind in enumerate(kinds):
            layer = layer_index(cfg.segments, segment, repeat, place)
            old = None if old_caches is None else old_caches[place]
            x_BTD, new, tally = block(p[str(place)], x_BTD, inputs, old, cfg, kind, layer)
            new_caches.append(new)
            if tally is not None:
                tallies[str(place)] = tally
        return x_BTD, (None if old_caches is None else new_caches, tallies)

    return period


def looped(
    period: Period, inputs: LayerInputs, x_BTD: jax.Array, layers: list[Params], caches: list[Any] | None
) -> tuple[jax.Array, list[Any], dict[str, moe.Tally]]:
    new_caches, tallies = [], []
    for repeat, p in enumerate(layers):
        old = None if caches is None else caches[repeat]
        x_BTD, (new, tally) = period(inputs, x_BTD, (p, repeat, old))
        new_caches.append(new)
        tallies.append(tally)
    return x_BTD, new_caches, jax.tree.map(lambda *repeats: jnp.stack(repeats), *tallies)


def scanned(
    remat: Callable[..., Any],
    unroll: float,
    period: Period,
    inputs: LayerInputs,
    x_BTD: jax.Array,
    layers: Params,
    first: int | jax.Array,
) -> tuple[jax.Array, dict[str, moe.Tally]]:
    """`first` is the number of the first of these repeats in the segment."""
    repeats = len(jax.tree.leaves(layers)[0])
    xs = (layers, first + jnp.arange(repeats), None)
    body = remat(functools.partial(period, inputs))
    x_BTD, (_, tallies) = jax.lax.scan(body, x_BTD, xs, unroll=max(1, round(unroll * repeats)))
    return x_BTD, tallies


# The ends ---------------------------------------------------------------------------------------------------------


def unembed(params: Params, x: jax.Array, *, spec: Spec, cfg: ModelConfig) -> jax.Array:
    """x[..., D] -> float32 logits[..., V]. On a mesh `params` are gathered."""
    # A tied head is declared as "embed". Its params may have an "unembed" all the same: `unstack` makes one on a CPU,
    # and `small_weights` one in fewer bits.
    weight: Weight = spec["embed" if cfg.tied else "unembed"]
    name = "unembed" if "unembed" in params else "embed"
    w = each_array(functools.partial(cast, dtype=cfg.dtype), weight, params[name])
    scaled_x = times(x, cfg.logit_scale * weight.scaling.logits)
    logits = linear(scaled_x, w, rows_out=name == "embed", dtype=jnp.float32)
    return softcap(logits, cfg.logit_softcap)


def empty_cache(params: Params, batch: int, length: int, *, spec: Spec, cfg: ModelConfig) -> Cache:
    """Room for `length` tokens a row, for unstacked weights. What stands in front of every text is in it."""
    length += front.places(params)

    def layer(kind: LayerKind, p: Params) -> Any:
        mixer = MIXERS[kind.mixer]
        return mixer.empty_cache(p[mixer.name], cfg, kind, batch, length)

    def period(segment: int, repeat: int) -> list[Any]:
        layers = params["segments"][str(segment)][repeat]
        return [layer(kind, layers[str(place)]) for place, kind in enumerate(cfg.segments[segment][0])]

    cache: Cache = [[period(s, i) for i in range(repeats)] for s, (_, repeats) in enumerate(cfg.segments)]
    if front.has_prompt(params):
        cache = whole_rows(params, front.prompt_alone(params, batch), spec, cfg, cache=cache)[1]
        cache = [[list(map(behind_front, layers)) for layers in periods] for periods in cache]
    return cache


def mixing_flops(cfg: ModelConfig, T: int, *, causal: bool) -> int:
    """Forward FLOPs between the activations of one row of T tokens, in all mixers."""
    return sum(MIXERS[kind.mixer].flops(cfg, kind, T, causal=causal) for kind in cfg.kinds)
