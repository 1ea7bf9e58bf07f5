"""Small functions on arrays: normalization, dropout, embedding lookup."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmjax.layout import current_mesh
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


def dropout(x_BTD: jax.Array, keys_B: jax.Array | None, rate: float, layer: int | jax.Array, site: int) -> jax.Array:
    """Zero a share `rate` of the entries and scale up the rest; `keys_B` None means evaluation.

    A mask is named by (sample, layer, site) and by nothing else: accumulation, mesh and resume leave it identical.
    """
    if keys_B is None or rate == 0:
        return x_BTD

    def one(key: jax.Array, x_TD: jax.Array) -> jax.Array:
        site_key = jax.random.fold_in(jax.random.fold_in(key, layer), site)
        return jnp.where(jax.random.bernoulli(site_key, 1 - rate, x_TD.shape), x_TD / (1 - rate), 0)

    return jax.vmap(one)(keys_B, x_BTD)


def lookup(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Rows of a whole table -> [B, T, D], lying as the ids do."""
    if current_mesh() is None:
        return table_VD[ids_BT]
    return table_VD.at[ids_BT].get(out_sharding=PartitionSpec(*jax.typeof(ids_BT).sharding.spec, None))
