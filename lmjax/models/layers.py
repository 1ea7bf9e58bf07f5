"""Small functions on arrays: normalization, embedding lookup."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmjax.devices.gather import all_gather, per_device
from lmjax.devices.mesh import current_mesh, mesh_axes, partition_spec, specs_of
from lmjax.models.config import ModelConfig
from lmjax.weights import Params, Spec, Weight, ones, zeros


def norm_weights(cfg: ModelConfig, axes: str = "embed") -> Spec:
    """Scale, and for LayerNorm with biases a shift. The start is the identity whatever the stored offset."""
    start = ones if cfg.norm_offset == 0 else _constant(1 - cfg.norm_offset)
    weights = {"scale": Weight(f"-> {axes}", kind="scale", init=start)}
    if cfg.norm == "layer" and cfg.bias:
        weights["bias"] = Weight(f"-> {axes}", kind="bias", init=zeros)
    return weights


def _constant(value: float) -> Callable[[jax.Array, Weight], jax.Array]:
    return lambda key, weight: jnp.full(weight.shape, value)


def norm(p: Params, x: jax.Array, cfg: ModelConfig) -> jax.Array:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last axis, in float32."""
    centred = cfg.norm == "layer"
    return _normalize(x, p["scale"] + cfg.norm_offset, p.get("bias"), cfg.norm_epsilon, centred=centred)


def rms_norm(p: Params, x: jax.Array, cfg: ModelConfig) -> jax.Array:
    """RMSNorm over the axes that the scale has, whatever `cfg.norm` is: what qk_norm means in every published model."""
    return _normalize(x, p["scale"] + cfg.norm_offset, None, cfg.norm_epsilon, centred=False)


def _normalize(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float, *, centred: bool) -> jax.Array:
    y, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    if centred:
        y = y - jnp.mean(y, axis=axes, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + epsilon) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def lookup(table_RD: jax.Array, ids_BT: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a replicated float32 table -> [B, T, D], sharded as the ids are."""
    if current_mesh() is None:
        return table_RD[ids_BT].astype(dtype)
    spec = PartitionSpec(*jax.typeof(ids_BT).sharding.spec, None)
    return table_RD.at[ids_BT].get(out_sharding=spec).astype(dtype)


def _rows(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Rows of a table in any type, whose gradient is added up in float32."""
    V, D = table_VD.shape

    @jax.custom_vjp
    def rows(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        return table_VD[ids_BT]

    def backward(ids_BT: jax.Array, gradient_BTD: jax.Array) -> tuple[jax.Array, None]:
        sums_VD = jnp.zeros((V, D)).at[ids_BT].add(gradient_BTD.astype(jnp.float32))
        return sums_VD.astype(gradient_BTD.dtype), None

    rows.defvjp(lambda table_VD, ids_BT: (table_VD[ids_BT], ids_BT), backward)
    return rows(table_VD, ids_BT)


def lookup_tokens(table_VD: Any, ids_BT: jax.Array, dtype: Any) -> jax.Array:
    """Rows of the embedding table (an array, or a compound) -> [B, T, D], sharded as the residual stream is.

    A row's gradient is added up in float32 whatever `dtype` is: a frequent token has thousands of terms, and a sum in
    bfloat16 stops growing after a few hundred.

    Each device finds the ids whose rows it holds, for all tokens that it will share with its neighbours along tensor;
    the sum over them, of which each needs its own tokens, is a reduce-scatter (Shoeybi et al. 2019, arXiv:1909.08053).
    """
    if hasattr(table_VD, "lookup"):
        return table_VD.lookup(lambda table: lookup_tokens(table, ids_BT, dtype))
    if current_mesh() is None:
        return table_VD[ids_BT].astype(dtype)

    table_spec, tensor = specs_of(table_VD), mesh_axes("vocab")

    def local(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        table_VD, V = all_gather(table_VD.astype(dtype), table_spec), len(table_VD)
        if not tensor:
            return _rows(table_VD, ids_BT)
        ids_BT = ids_BT - V * jax.lax.axis_index(tensor)
        mine_BT = (ids_BT >= 0) & (ids_BT < V)
        x_BTD = jnp.where(mine_BT[..., None], _rows(table_VD, jnp.where(mine_BT, ids_BT, 0)), 0)
        return jax.lax.psum_scatter(x_BTD, tensor, scatter_dimension=1, tiled=True)

    in_specs = (table_spec, partition_spec(("batch", "time")))
    return per_device(local, in_specs, partition_spec(("batch", "residual_time", None)))(table_VD, ids_BT)
