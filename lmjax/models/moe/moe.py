"""A mixture of experts in place of an mlp: a router sends each token through the few experts that score highest.

    route      scores in float32, the X highest chosen; on a tie the expert of lower index
    dispatch   dropless: tokens sorted by expert, one ragged matrix product over all of them
               capacity: each expert takes C tokens of a sequence, the first that choose it; arrays of fixed size
    combine    the chosen experts' outputs, weighed by their scores

A sequence is routed by itself. Which of its tokens find room depends on earlier tokens alone (GShard and Switch let the
first choices of all tokens go before second choices, and share room between sequences: then whether a token passes
depends on later ones, and on its neighbours in the batch). And the balance loss is that of each sequence, weighed by
its tokens, so that neither microbatches nor a mesh can change it. Letters beside the legend in model.py:

    X chosen experts of a token      A = T X choices of a sequence, or of all rows      C room of an expert
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.devices.gather import all_gather, per_device
from lmjax.devices.mesh import constrain, current_mesh, mesh_axes, partition_spec, shards, specs_of
from lmjax.devices.rows import token_order
from lmjax.metrics import Metrics
from lmjax.models.attention.attention import platform
from lmjax.models.config import ModelConfig, MoeConfig
from lmjax.models.linear import add_bias, linear
from lmjax.models.mlp import feed_forward, mlp, mlp_weights
from lmjax.models.moe.exchange import routes, send, send_back
from lmjax.models.moe.grouped import grouped_dot
from lmjax.weights import Initializer, Params, Spec, Weight, map_weights, zeros

# Weights ----------------------------------------------------------------------------------------------------------


def weights(cfg: ModelConfig, into: Initializer, out: Initializer) -> Spec:
    """Each expert is a matrix of its own: to initialization, optimizers and decay `experts` is a batch axis."""
    spec: Spec = {
        "router": Weight("embed -> routes", init=into, float32=True),
        "experts": map_weights(lambda one: _experts(one, cfg.moe), mlp_weights(cfg, into, out, "expert_mlp")),
    }
    if cfg.moe.bias_rate is not None:
        spec["bias"] = Weight("-> routes", kind="buffer", init=zeros)
    if cfg.moe.shared_mlp is not None:
        spec["shared"] = mlp_weights(cfg, into, out, "shared_mlp")
    if cfg.moe.shared_gate:
        spec["shared_gate"] = Weight("embed -> shared_gate", init=into)
    return spec


def _experts(one: Weight, moe: MoeConfig) -> Weight:
    return Weight(f"experts | {one.axes}", one.kind, one.init, active=moe.top_k)


# The layer --------------------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    chosen_BTX: jax.Array
    """int32, the experts of each token, the highest score first."""
    weights_BTX: jax.Array
    """float32, what each one's output is multiplied by."""
    real_BT: jax.Array
    """Which tokens are not padding."""


class Tally(NamedTuple):
    """What the router of one layer did, summed over tokens that are not padding."""

    load_E: jax.Array
    """How many tokens chose each expert."""
    balance: jax.Array
    """Of each sequence's balance loss, times its tokens."""
    router_z: jax.Array
    """logsumexp(logits)^2."""
    dropped: jax.Array
    """Choices that found no room."""


def mixture(
    p: Params, x_BTD: jax.Array, real_BT: jax.Array, cfg: ModelConfig, *, training: bool
) -> tuple[jax.Array, Tally]:
    """x_BTD through its experts -> (y_BTD, what the router did). Outside training nothing is dropped."""
    with jax.default_matmul_precision("float32"):  # on accelerators too: a choice hangs on small differences
        logits_BTE = linear(x_BTD.astype(jnp.float32), p["router"])
    whole_rows = training and cfg.moe.dispatch == "capacity"
    routed = _on_devices(functools.partial(_routed, cfg=cfg, whole_rows=whole_rows), whole_rows)
    y_BTD, tally = routed(p["experts"], p.get("bias"), x_BTD, logits_BTE, real_BT)
    if cfg.moe.shared_mlp is not None:
        shared_BTD = mlp(p["shared"], x_BTD, cfg)
        if cfg.moe.shared_gate:
            gate_BT1 = jax.nn.sigmoid(linear(x_BTD, p["shared_gate"], dtype=jnp.float32))  # whose gradient sums over D
            shared_BTD = (gate_BT1 * shared_BTD).astype(x_BTD.dtype)
        y_BTD = y_BTD + shared_BTD
    return y_BTD, tally


Routed = Callable[..., tuple[jax.Array, Tally]]


def _on_devices(routed: Routed, whole_rows: bool) -> Routed:
    """On a mesh each device routes its own tokens; devices of mesh.expert then send them to each other's experts.

    Capacity asks which tokens of a row come first: devices that share rows then all route the whole rows.
    """
    if current_mesh() is None:
        return routed
    devices = mesh_axes("batch")
    row = ("batch", None if whole_rows else "residual_time", None)
    rows_lie, everywhere = partition_spec(row), partition_spec(())

    def on_mesh(experts: Params, bias_E: jax.Array | None, *rows: jax.Array) -> tuple[jax.Array, Tally]:
        experts_lie = specs_of(experts)

        def local(experts: Params, bias_E: jax.Array | None, *rows: jax.Array) -> tuple[jax.Array, Tally]:
            order_T = token_order(rows[0].shape[1]) if whole_rows else jnp.arange(rows[0].shape[1])
            in_order = (x[:, jnp.argsort(order_T)] for x in rows)
            y_BTD, tally = routed(all_gather(experts, experts_lie), bias_E, *in_order)
            return y_BTD[:, order_T], jax.tree.map(lambda x: jax.lax.psum(x, devices), tally)

        rows = tuple(constrain(x, *row[: x.ndim]) for x in rows)
        in_specs = (experts_lie, everywhere, rows_lie, rows_lie, partition_spec(row[:2]))
        y_BTD, tally = per_device(local, in_specs, (rows_lie, everywhere))(experts, bias_E, *rows)
        return constrain(y_BTD, "batch", "time", None), tally

    return on_mesh


def _routed(
    experts: Params,
    bias_E: jax.Array | None,
    x_BTD: jax.Array,
    logits_BTE: jax.Array,
    real_BT: jax.Array,
    cfg: ModelConfig,
    *,
    whole_rows: bool,
) -> tuple[jax.Array, Tally]:
    scores_BTE = score(logits_BTE, cfg.moe)
    routing = choose(scores_BTE, bias_E, real_BT, cfg.moe)
    if whole_rows:
        y_BTD, dropped = capacity(experts, x_BTD, routing, cfg)
    else:
        y_BTD, dropped = dropless(experts, x_BTD, routing, cfg), jnp.zeros(())
    shared_by = () if whole_rows else mesh_axes("residual_time")
    return y_BTD, observe(logits_BTE, scores_BTE, routing, dropped, cfg.moe, shared_by)


# Routing ----------------------------------------------------------------------------------------------------------


def score(logits_BTE: jax.Array, moe: MoeConfig) -> jax.Array:
    return jax.nn.softmax(logits_BTE, axis=-1) if moe.score == "softmax" else jax.nn.sigmoid(logits_BTE)


def choose(scores_BTE: jax.Array, bias_E: jax.Array | None, real_BT: jax.Array, moe: MoeConfig) -> Routing:
    """The `top_k` highest scores; a bias moves the choice but not the weights (arXiv:2408.15664, equation 3)."""
    ranked_BTE = scores_BTE if bias_E is None else scores_BTE + bias_E
    _, chosen_BTX = jax.lax.top_k(jax.lax.stop_gradient(ranked_BTE), moe.top_k)
    weights_BTX = jnp.take_along_axis(scores_BTE, chosen_BTX, axis=-1)
    if moe.normalize:
        weights_BTX /= weights_BTX.sum(axis=-1, keepdims=True) + 1e-20  # sigmoids may all be zero
    return Routing(chosen_BTX, weights_BTX * moe.scale, real_BT)


def observe(
    logits_BTE: jax.Array,
    scores_BTE: jax.Array,
    routing: Routing,
    dropped: jax.Array,
    moe: MoeConfig,
    shared_by: tuple[str, ...] = (),
) -> Tally:
    """Sums for the auxiliary losses and the metrics; `shared_by` are the mesh axes whose devices share rows.

    The balance loss of a sequence is E sum_e f_e P_e, with f_e the share of its choices that fell on expert e and P_e
    its mean probability: Switch (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6) for several choices, and as in
    DeepSeek-V3 (arXiv:2412.19437, equations 17 to 20) by sequence, sigmoids divided by their sum. 1 is balance.
    The z-loss is that of ST-MoE (Zoph et al. 2022, arXiv:2202.08906, equation 5).
    """
    E, X = scores_BTE.shape[-1], moe.top_k
    real_BT1 = routing.real_BT[..., None]
    probabilities_BTE = scores_BTE / (scores_BTE.sum(axis=-1, keepdims=True) + 1e-20)

    def of_row(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, shared_by)

    load_BE = of_row(jnp.sum(jax.nn.one_hot(routing.chosen_BTX, E).sum(axis=2) * real_BT1, axis=1))
    probability_BE = of_row(jnp.sum(probabilities_BTE * real_BT1, axis=1))
    tokens_B = jnp.maximum(of_row(routing.real_BT.sum(axis=1)), 1)
    balance_B = E / X * jnp.sum(load_BE * probability_BE, axis=-1) / tokens_B
    router_z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * routing.real_BT
    return Tally(load_BE.sum(axis=0), balance_B.sum(), of_row(router_z_BT.sum()), dropped)


# Dispatch ---------------------------------------------------------------------------------------------------------


def dropless(p: Params, x_BTD: jax.Array, routing: Routing, cfg: ModelConfig) -> jax.Array:
    """Every token through all its experts, which may be another device's."""
    D, experts = x_BTD.shape[-1], len(p["up"])
    chosen_A = routing.chosen_BTX.reshape(-1)
    order_A = jnp.argsort(chosen_A)
    x_AD, chosen_A = x_BTD.reshape(-1, D)[order_A // cfg.moe.top_k], chosen_A[order_A]
    if shards("experts") == 1:
        y_AD = _sorted_rows(p, x_AD, chosen_A, cfg)
    else:
        ragged, by = platform() != "cpu", routes(chosen_A // experts)
        expert_R = send(by, chosen_A % experts, fill=experts, ragged=ragged)  # `experts` marks an empty place
        order_R = jnp.argsort(expert_R)
        x_RD = send(by, x_AD, ragged=ragged)[order_R]
        y_RD = _sorted_rows(p, x_RD, expert_R[order_R], cfg)[jnp.argsort(order_R)]
        y_AD = send_back(by, y_RD, ragged=ragged)
    return combine(y_AD[jnp.argsort(order_A)].reshape(*routing.chosen_BTX.shape, D), routing.weights_BTX)


def _sorted_rows(p: Params, x_AD: jax.Array, expert_A: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Rows sorted by expert, multiplied group by group; what comes out of rows without an expert means nothing."""
    load_E = jnp.bincount(expert_A, length=len(p["up"]))

    def project(x_AI: jax.Array, name: str) -> jax.Array:
        y_AO = grouped_dot(x_AI, p[name], load_E)
        bias_EO = p.get(f"{name}_bias")
        return y_AO if bias_EO is None else y_AO + bias_EO[expert_A].astype(x_AI.dtype)

    return feed_forward(project, x_AD, cfg)


def capacity(p: Params, x_BTD: jax.Array, routing: Routing, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Every expert takes C tokens of each sequence -> (y_BTD, how many choices found no room).

    A choice without room adds nothing (Lepikhin et al. 2020, arXiv:2006.16668); padding takes no room.
    """
    (B, T, D), E, C = x_BTD.shape, len(p["up"]) * shards("experts"), room(x_BTD.shape[1], cfg.moe)
    slots_BA, source_BS = jax.vmap(lambda chosen_TX, real_T: _slots(chosen_TX, real_T, E, C))(
        routing.chosen_BTX, routing.real_BT
    )
    # A slot without a token reads zeros, and so does a choice without a slot: both are out of bounds.
    x_BSD = jax.vmap(lambda x_TD, source_S: x_TD.at[source_S].get(mode="fill", fill_value=0))(x_BTD, source_BS)
    x_ERD = x_BSD.reshape(B, E, C, D).swapaxes(0, 1).reshape(E, B * C, D)

    def project(x_ERI: jax.Array, name: str) -> jax.Array:
        y_ERO = jnp.einsum("ERI,EIO->ERO", x_ERI, p[name], preferred_element_type=x_ERI.dtype)
        bias_EO = p.get(f"{name}_bias")
        return y_ERO if bias_EO is None else add_bias(y_ERO, bias_EO[:, None])

    y_ERD = feed_forward(project, x_ERD, cfg) if shards("experts") == 1 else _exchanged(project, x_ERD, cfg)
    y_BSD = y_ERD.reshape(E, B, C, D).swapaxes(0, 1).reshape(B, E * C, D)
    y_BAD = jax.vmap(lambda y_SD, slots_A: y_SD.at[slots_A].get(mode="fill", fill_value=0))(y_BSD, slots_BA)
    chosen = routing.real_BT.sum() * cfg.moe.top_k
    dropped = (chosen - (slots_BA < E * C).sum()).astype(jnp.float32)
    return combine(y_BAD.reshape(B, T, cfg.moe.top_k, D), routing.weights_BTX), dropped


def _exchanged(project: Callable[[jax.Array, str], jax.Array], x_ERD: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Rows of all experts to the devices that hold them, through them, and back."""
    axes = mesh_axes("experts")
    y_ERD = feed_forward(project, jax.lax.all_to_all(x_ERD, axes, split_axis=0, concat_axis=1, tiled=True), cfg)
    return jax.lax.all_to_all(y_ERD, axes, split_axis=1, concat_axis=0, tiled=True)


def room(T: int, moe: MoeConfig) -> int:
    """C, how many of a sequence's T tokens an expert takes."""
    assert moe.experts is not None
    return min(T, math.ceil(moe.capacity_factor * moe.top_k * T / moe.experts))


def _slots(chosen_TX: jax.Array, real_T: jax.Array, E: int, C: int) -> tuple[jax.Array, jax.Array]:
    """(the slot of each choice, the token of each slot), S = E C slots; out of bounds where there is none.

    Choices are served in the order of tokens, a token's own in the order of their scores.
    """
    T, X = chosen_TX.shape
    expert_A = chosen_TX.reshape(-1)
    asked_AE = jax.nn.one_hot(expert_A, E, dtype=jnp.int32) * jnp.repeat(real_T, X)[:, None]
    before_A = jnp.sum((jnp.cumsum(asked_AE, axis=0) - asked_AE) * asked_AE, axis=1)
    served_A = (before_A < C) & jnp.repeat(real_T, X)
    slots_A = jnp.where(served_A, expert_A * C + before_A, E * C)
    source_S = jnp.full(E * C, T).at[slots_A].set(jnp.arange(T * X) // X, mode="drop")
    return slots_A, source_S


def combine(y_BTXD: jax.Array, weights_BTX: jax.Array) -> jax.Array:
    """The weighted sum over a token's experts, in float32."""
    return jnp.sum(y_BTXD * weights_BTX[..., None], axis=2).astype(y_BTXD.dtype)


# Losses and balance -----------------------------------------------------------------------------------------------


def scalars(moe: MoeConfig) -> dict[str, float]:
    """What a sweep may vary without another program."""
    weights = {"balance_weight": moe.balance_weight, "router_z_weight": moe.router_z_weight}
    return {} if moe.experts is None else {**weights, "bias_rate": moe.bias_rate or 0.0}


def auxiliary(moe: MoeConfig) -> dict[str, str]:
    """The auxiliary losses by the names of their metrics, and the scalar that each is multiplied by.

    Each is a mean over tokens and mixture layers.
    """
    losses = {"balance_loss": "balance_weight", "router_z_loss": "router_z_weight"}
    return {loss: weight for loss, weight in losses.items() if scalars(moe).get(weight)}


def metrics(tallies: dict[str, dict[str, Tally]], real_BT: jax.Array, moe: MoeConfig) -> Metrics:
    """Of the tallies by segment and slot, layers in front: means over tokens and mixture layers, and the loads."""
    layers = [tally for slots in tallies.values() for tally in slots.values()]
    if not layers:
        return {}
    n_layers = sum(len(tally.balance) for tally in layers)
    tokens = real_BT.sum().astype(jnp.float32)

    def mean(name: str, per_token: int = 1) -> tuple[Any, Any]:
        return sum(getattr(tally, name).sum() for tally in layers) / (n_layers * per_token), tokens

    loads = {segment: {slot: tally.load_E for slot, tally in slots.items()} for segment, slots in tallies.items()}
    return {
        "balance_loss": mean("balance"),
        "router_z_loss": mean("router_z"),
        "load": (loads, tokens),
        **({"dropped": mean("dropped", moe.top_k)} if moe.dispatch == "capacity" else {}),
    }


def after_update(
    params: Params, metrics: Metrics, hyper: Mapping[str, Any], *, cfg: MoeConfig
) -> tuple[Params, Metrics]:
    """After an update: biases move against the load of the whole batch, which is then reported as one number.

    An expert that more tokens chose than the mean loses `bias_rate`, one that fewer chose gains it (arXiv:2408.15664,
    algorithm 1). `max_load` is the busiest expert's load over the mean, on average over mixture layers.
    """
    if "load" not in metrics:
        return params, metrics
    loads, _ = metrics["load"]
    busiest_L = [load_LE.max(axis=1) / load_LE.mean(axis=1) for load_LE in jax.tree.leaves(loads)]  # by slot
    shown = {name: pair for name, pair in metrics.items() if name != "load"}
    shown["max_load"] = (sum(map(jnp.sum, busiest_L)), jnp.float32(sum(map(len, busiest_L))))
    if cfg.bias_rate is None:
        return params, shown

    def moved(layer: Params, load_LE: jax.Array | None) -> Params:
        if load_LE is None or "bias" not in layer.get("moe", {}):  # a dense layer, or one whose biases are frozen
            return layer
        error_LE = load_LE.mean(axis=1, keepdims=True) - load_LE
        bias_LE = layer["moe"]["bias"] + hyper["bias_rate"] * jnp.sign(error_LE)
        return {**layer, "moe": {**layer["moe"], "bias": bias_LE}}

    segments = {
        name: {slot: moved(layer, loads[name].get(slot)) for slot, layer in slots.items()}
        for name, slots in params.get("segments", {}).items()
    }
    return {**params, **({"segments": segments} if segments else {})}, shown
