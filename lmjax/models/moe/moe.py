"""A mixture of experts in place of an mlp: a router sends each token through the few experts that score highest.

    route      scores in float32, the X highest are chosen (routing.py)
    dispatch   dropless: tokens are sorted by expert, and one ragged matrix product multiplies all of them
               capacity: each expert takes the first tokens of a sequence that choose it, up to a fixed number
    combine    the sum of the chosen experts' outputs, weighed by their scores

A new rule of dispatch is one function and one line in `DISPATCHES`.

A sequence is routed by itself. Whether one of its tokens is dropped depends on earlier tokens alone. GShard and Switch
serve the first choices of all tokens before second choices, and share an expert's capacity between sequences: then
whether a token is dropped depends on later tokens, and on the other sequences of the batch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.devices.gather import all_gather, per_device
from lmjax.devices.mesh import constrain, current_mesh, mesh_axes, partition_spec, platform, shards, specs_of
from lmjax.devices.rows import token_order
from lmjax.metrics import Metrics
from lmjax.models.config import ModelConfig, MoeConfig
from lmjax.models.linear import add_bias, linear, multiply
from lmjax.models.mlp import feed_forward, mlp, mlp_weights
from lmjax.models.moe.exchange import routes, send, send_back
from lmjax.models.moe.grouped import grouped_dot
from lmjax.models.moe.routing import Routing, choose, observe, score
from lmjax.models.moe.routing import Tally as Tally
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


class Dispatch(NamedTuple):
    """How tokens reach their experts in training."""

    run: Callable[[Params, jax.Array, Routing, ModelConfig], tuple[jax.Array, jax.Array]]
    """(experts, x_BTD, routing, cfg) -> (y_BTD, how many choices were dropped). On a mesh it runs on every device."""
    whole_rows: bool
    """Whether a device must see all tokens of a row, in their order, also where rows are sharded along `context` or
    `tensor`. All of the devices that share a row then compute the same."""


def mixture(
    p: Params,
    x_BTD: jax.Array,
    real_BT: jax.Array,
    cfg: ModelConfig,
    *,
    training: bool,
    text_BT: jax.Array | None = None,
) -> tuple[jax.Array, Tally]:
    """x_BTD through its experts -> (y_BTD, what the router did). Outside training nothing is dropped.

    Where a soft prompt is in front of rows, `text_BT` tells the tokens behind it: these alone are counted.
    """
    with jax.default_matmul_precision("float32"):  # on accelerators too: small differences decide a choice
        logits_BTE = linear(x_BTD.astype(jnp.float32), p["router"])
    dispatch = DISPATCHES[cfg.moe.dispatch if training else "dropless"]
    tokens = (x_BTD, logits_BTE, real_BT) if text_BT is None else (x_BTD, logits_BTE, real_BT, text_BT)
    y_BTD, tally = _on_devices(dispatch, cfg, p["experts"], p.get("bias"), *tokens)
    if cfg.moe.shared_mlp is not None:
        shared_BTD = mlp(p["shared"], x_BTD, cfg)
        if cfg.moe.shared_gate:
            gate_BT1 = jax.nn.sigmoid(linear(x_BTD, p["shared_gate"], dtype=jnp.float32))  # whose gradient sums over D
            shared_BTD = (gate_BT1 * shared_BTD).astype(x_BTD.dtype)
        y_BTD = y_BTD + shared_BTD
    return y_BTD, tally


def _on_devices(
    dispatch: Dispatch, cfg: ModelConfig, experts: Params, bias_E: jax.Array | None, *tokens: jax.Array
) -> tuple[jax.Array, Tally]:
    """`_routed` of x_BTD, logits_BTE, real_BT and perhaps text_BT; on a mesh every device routes its own tokens."""
    if current_mesh() is None:
        return _routed(dispatch, cfg, experts, bias_E, *tokens)
    devices = mesh_axes("batch")
    names = ("batch", None if dispatch.whole_rows else "residual_time", None)
    experts_specs, tokens_spec, replicated = specs_of(experts), partition_spec(names), partition_spec(())

    def local(experts: Params, bias_E: jax.Array | None, *tokens: jax.Array) -> tuple[jax.Array, Tally]:
        T = tokens[0].shape[1]
        order_T = token_order(T) if dispatch.whole_rows else jnp.arange(T)
        in_order = (x[:, jnp.argsort(order_T)] for x in tokens)
        y_BTD, tally = _routed(dispatch, cfg, all_gather(experts, experts_specs), bias_E, *in_order)
        return y_BTD[:, order_T], jax.tree.map(lambda x: jax.lax.psum(x, devices), tally)

    tokens = tuple(constrain(x, *names[: x.ndim]) for x in tokens)
    in_specs = (experts_specs, replicated, *(partition_spec(names[: x.ndim]) for x in tokens))
    y_BTD, tally = per_device(local, in_specs, (tokens_spec, replicated))(experts, bias_E, *tokens)
    return constrain(y_BTD, "batch", "time", None), tally


def _routed(
    dispatch: Dispatch,
    cfg: ModelConfig,
    experts: Params,
    bias_E: jax.Array | None,
    x_BTD: jax.Array,
    logits_BTE: jax.Array,
    real_BT: jax.Array,
    text_BT: jax.Array | None = None,
) -> tuple[jax.Array, Tally]:
    scores_BTE = score(logits_BTE, cfg.moe)
    routing = choose(scores_BTE, bias_E, real_BT, cfg.moe)
    routing = routing if text_BT is None else routing._replace(counted_BT=text_BT)
    y_BTD, dropped = dispatch.run(experts, x_BTD, routing, cfg)
    shared_by = () if dispatch.whole_rows else mesh_axes("residual_time")
    return y_BTD, observe(logits_BTE, scores_BTE, routing, dropped, cfg.moe, shared_by)


# Dispatch ---------------------------------------------------------------------------------------------------------


def dropless(p: Params, x_BTD: jax.Array, routing: Routing, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Every token through all its chosen experts, which other devices may hold -> (y_BTD, 0 dropped choices)."""
    D, experts = x_BTD.shape[-1], held_here(cfg)
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
    y_BTXD = y_AD[jnp.argsort(order_A)].reshape(*routing.chosen_BTX.shape, D)
    return combine(y_BTXD, routing.weights_BTX), jnp.zeros(())


def held_here(cfg: ModelConfig) -> int:
    """How many experts a device holds."""
    return cfg.dims["experts"] // shards("experts")


def _sorted_rows(p: Params, x_AD: jax.Array, expert_A: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Multiply rows that are sorted by expert; the results of rows without an expert are undefined."""
    load_E = jnp.bincount(expert_A, length=held_here(cfg))

    def dot(x_AI: jax.Array, w_EIO: jax.Array, **_: Any) -> jax.Array:
        return grouped_dot(x_AI, w_EIO, load_E)

    def project(x_AI: jax.Array, name: str) -> jax.Array:
        y_AO = multiply(x_AI, p[name], dot)
        bias_EO = p.get(f"{name}_bias")
        return y_AO if bias_EO is None else y_AO + bias_EO[expert_A].astype(x_AI.dtype)

    return feed_forward(project, x_AD, cfg)


def capacity(p: Params, x_BTD: jax.Array, routing: Routing, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Every expert takes a fixed number of tokens of each sequence -> (y_BTD, how many choices were dropped).

    A dropped choice adds nothing (Lepikhin et al. 2020, arXiv:2006.16668). Padding takes no slot.
    """
    (B, T, D), E, slots = x_BTD.shape, cfg.dims["experts"], room(x_BTD.shape[1], cfg.moe)
    slot_BA, source_BQ = jax.vmap(lambda chosen_TX, real_T: _slots(chosen_TX, real_T, E, slots))(
        routing.chosen_BTX, routing.real_BT
    )
    # A slot without a token reads zeros, and so does a choice without a slot: both are out of bounds.
    x_BQD = jax.vmap(lambda x_TD, source_Q: x_TD.at[source_Q].get(mode="fill", fill_value=0))(x_BTD, source_BQ)
    x_ERD = x_BQD.reshape(B, E, slots, D).swapaxes(0, 1).reshape(E, B * slots, D)

    def dot(x_ERI: jax.Array, w_EIO: jax.Array, **_: Any) -> jax.Array:
        return jnp.einsum("ERI,EIO->ERO", x_ERI, w_EIO, preferred_element_type=x_ERI.dtype)

    def project(x_ERI: jax.Array, name: str) -> jax.Array:
        y_ERO = multiply(x_ERI, p[name], dot)
        bias_EO = p.get(f"{name}_bias")
        return y_ERO if bias_EO is None else add_bias(y_ERO, bias_EO[:, None])

    y_ERD = feed_forward(project, x_ERD, cfg) if shards("experts") == 1 else _exchanged(project, x_ERD, cfg)
    y_BQD = y_ERD.reshape(E, B, slots, D).swapaxes(0, 1).reshape(B, E * slots, D)
    y_BAD = jax.vmap(lambda y_QD, slot_A: y_QD.at[slot_A].get(mode="fill", fill_value=0))(y_BQD, slot_BA)
    has_none_BTX = (slot_BA == E * slots).reshape(B, T, cfg.moe.top_k)
    dropped = (has_none_BTX & routing.counted_BT[..., None]).sum().astype(jnp.float32)
    return combine(y_BAD.reshape(B, T, cfg.moe.top_k, D), routing.weights_BTX), dropped


def _exchanged(project: Callable[[jax.Array, str], jax.Array], x_ERD: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Rows of all experts to the devices that hold them, through them, and back."""
    axes = mesh_axes("experts")
    y_ERD = feed_forward(project, jax.lax.all_to_all(x_ERD, axes, split_axis=0, concat_axis=1, tiled=True), cfg)
    return jax.lax.all_to_all(y_ERD, axes, split_axis=1, concat_axis=0, tiled=True)


def room(T: int, moe: MoeConfig) -> int:
    """How many slots an expert has for a sequence of T tokens: its capacity."""
    assert moe.experts is not None
    return min(T, math.ceil(moe.capacity_factor * moe.top_k * T / moe.experts))


def _slots(chosen_TX: jax.Array, real_T: jax.Array, E: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """(slot_A, the slot of each choice; source_Q, the token of each slot); an index out of bounds means none.

    Choices are served in the order of tokens, and those of one token in the order of their scores.
    """
    T, X = chosen_TX.shape
    expert_A = chosen_TX.reshape(-1)
    asked_AE = jax.nn.one_hot(expert_A, E, dtype=jnp.int32) * jnp.repeat(real_T, X)[:, None]
    before_A = jnp.sum((jnp.cumsum(asked_AE, axis=0) - asked_AE) * asked_AE, axis=1)
    served_A = (before_A < slots) & jnp.repeat(real_T, X)
    slot_A = jnp.where(served_A, expert_A * slots + before_A, E * slots)
    source_Q = jnp.full(E * slots, T).at[slot_A].set(jnp.arange(T * X) // X, mode="drop")
    return slot_A, source_Q


def combine(y_BTXD: jax.Array, weights_BTX: jax.Array) -> jax.Array:
    """The weighted sum over a token's experts, in float32."""
    return jnp.sum(y_BTXD * weights_BTX[..., None], axis=2).astype(y_BTXD.dtype)


# Rules of dispatch by the names that `model.moe.dispatch` takes.
DISPATCHES: dict[str, Dispatch] = {
    "dropless": Dispatch(dropless, whole_rows=False),
    "capacity": Dispatch(capacity, whole_rows=True),
}


# Losses and balance -----------------------------------------------------------------------------------------------


def scalars(moe: MoeConfig) -> dict[str, float]:
    """What a sweep may vary without another program."""
    weights = {"balance_weight": moe.balance_weight, "router_z_weight": moe.router_z_weight}
    return {} if moe.experts is None else {**weights, "bias_rate": moe.bias_rate or 0.0}


def auxiliary(moe: MoeConfig) -> dict[str, str]:
    """The auxiliary losses by the names of their metrics, and the scalar that each is multiplied by.

    Each is a mean over tokens and mixture layers. The places of a soft prompt take no part, as padding takes none.
    """
    losses = {"balance_loss": "balance_weight", "router_z_loss": "router_z_weight"}
    return {loss: weight for loss, weight in losses.items() if scalars(moe).get(weight)}


def metrics(tallies: dict[str, dict[str, Tally]], counted_BT: jax.Array, moe: MoeConfig) -> Metrics:
    """Means over tokens and mixture layers, and the loads: a tree by segment and place in the period, as `tallies` are.

    The arrays of both have the repeats of the period in front.
    """
    layers = [tally for period in tallies.values() for tally in period.values()]
    if not layers:
        return {}
    n_layers = sum(len(tally.balance) for tally in layers)
    tokens = counted_BT.sum().astype(jnp.float32)

    def mean(name: str, per_token: int = 1) -> tuple[Any, Any]:
        return sum(getattr(tally, name).sum() for tally in layers) / (n_layers * per_token), tokens

    loads = {segment: {place: tally.load_E for place, tally in period.items()} for segment, period in tallies.items()}
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
    ratios = [load_LE.max(axis=1) / load_LE.mean(axis=1) for load_LE in jax.tree.leaves(loads)]  # of shape L each
    shown = {name: pair for name, pair in metrics.items() if name != "load"}
    shown["max_load"] = (sum(map(jnp.sum, ratios)), jnp.float32(sum(map(len, ratios))))
    if cfg.bias_rate is None:
        return params, shown

    def moved(layer: Params, load_LE: jax.Array | None) -> Params:
        if load_LE is None or "bias" not in layer.get("moe", {}):  # a dense layer, or one whose biases are frozen
            return layer
        error_LE = load_LE.mean(axis=1, keepdims=True) - load_LE
        bias_LE = layer["moe"]["bias"]  # of a stack that is cut, those of its last layers
        bias_LE = bias_LE + hyper["bias_rate"] * jnp.sign(error_LE[-len(bias_LE) :])
        return {**layer, "moe": {**layer["moe"], "bias": bias_LE}}

    segments = {
        name: {place: moved(layer, loads[name].get(place)) for place, layer in period.items()}
        for name, period in params.get("segments", {}).items()
    }
    return {**params, **({"segments": segments} if segments else {})}, shown
