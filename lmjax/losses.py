"""Losses of next-token prediction, on arrays alone.

The logits of a batch, [B, T, V] in float32, would be the largest array of a training step. `chunked_token_sums`
holds them for a few positions at a time and takes the gradient of each chunk while its logits exist, so nothing is
computed twice.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.devices.gather import all_gather, per_device, reduce_scatter
from lmjax.devices.mesh import current_mesh, mesh_axes, partition_spec, shards, specs_of

_TOKENS = ("batch", "time")

Head = Any
Unembed = Callable[[Head, jax.Array], jax.Array]


class Sums(NamedTuple):
    """Weighted sums over tokens; divide by the sum of weights."""

    loss: jax.Array
    """What is minimized: the token loss and the z-loss."""
    nll: jax.Array
    """-log p(target), nats."""
    z_loss: jax.Array
    correct: jax.Array
    """Targets that no token was more probable than; a tie counts, so constant logits are all correct."""


def negative_log_likelihood(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], nats, [B, T]."""
    return _logsumexp(logits_BTV) - _of_targets(logits_BTV, targets_BT)


# What each token adds to the loss: (float32 logits_BTV, targets_BT) -> [B, T]. All but the first are given whole logits
# where devices share the vocabulary.
TOKEN_LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "cross_entropy": negative_log_likelihood,
}


def token_sums(
    logits_BTV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_weight: float | jax.Array = 0.0,
    token_loss: str = "cross_entropy",
) -> Sums:
    """Weighted sums over tokens; z_weight * logsumexp(logits)^2 is PaLM's z-loss (arXiv:2204.02311, section 5).

    The likelihood is measured whatever loss is minimized, so that runs stay comparable.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    nll_BT = loss_BT = negative_log_likelihood(logits_BTV, targets_BT)
    if token_loss != "cross_entropy":
        loss_BT = TOKEN_LOSSES[token_loss](_whole(logits_BTV), targets_BT)
    z_loss_BT = z_weight * jnp.square(_logsumexp(logits_BTV))
    correct_BT = _of_targets(logits_BTV, targets_BT) >= _max(logits_BTV)
    return Sums(*(jnp.sum(x_BT * weights_BT) for x_BT in (loss_BT + z_loss_BT, nll_BT, z_loss_BT, correct_BT)))


# Along the vocabulary, of which each device along `tensor` may hold a part -----------------------------------------


def _logsumexp(logits_BTV: jax.Array) -> jax.Array:
    max_BT = _max(logits_BTV)
    sum_BT = jnp.sum(jnp.exp(logits_BTV - max_BT[..., None]), axis=-1)
    return max_BT + jnp.log(jax.lax.psum(sum_BT, mesh_axes("vocab")))


def _max(logits_BTV: jax.Array) -> jax.Array:
    """Without a gradient."""
    return jax.lax.pmax(jnp.max(jax.lax.stop_gradient(logits_BTV), axis=-1), mesh_axes("vocab"))


def _of_targets(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    axes = mesh_axes("vocab")
    if not axes:
        return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    V = logits_BTV.shape[-1]
    ids_V = V * jax.lax.axis_index(axes) + jnp.arange(V)
    return jax.lax.psum(jnp.sum(jnp.where(targets_BT[..., None] == ids_V, logits_BTV, 0), axis=-1), axes)


def _whole(logits_BTV: jax.Array) -> jax.Array:
    axes = mesh_axes("vocab")
    return jax.lax.all_gather(logits_BTV, axes, axis=-1, tiled=True) if axes else logits_BTV


# Chunk by chunk ---------------------------------------------------------------------------------------------------


def chunked_token_sums(
    unembed: Unembed,
    head: Head,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int,
    z_weight: float | jax.Array = 0.0,
    token_loss: str = "cross_entropy",
) -> Sums:
    """`token_sums(unembed(head, x), ...)` with logits for at most `chunk` positions of every row at a time.

    Only `loss` is differentiable. Chunks are of equal size; what is missing in the last is padded with weight 0.
    On a mesh every device cuts its own tokens into chunks, for which it gathers the head, and the head's gradients add
    up over devices once, after the last chunk.
    """

    def sums_of(head: Head, x_BCD: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array) -> Sums:
        return token_sums(unembed(head, x_BCD), targets_BC, weights_BC, z_weight, token_loss)

    if current_mesh() is None and chunk >= x_BTD.shape[1]:
        return sums_of(head, x_BTD, targets_BT, weights_BT)
    head_lies, x_lies, tokens_lie = specs_of(head), partition_spec((*_TOKENS, None)), partition_spec(_TOKENS)
    in_specs = (head_lies, x_lies, tokens_lie, tokens_lie)
    devices = mesh_axes("batch") + mesh_axes("time")

    @jax.custom_vjp
    def total(head: Head, x_BTD: jax.Array) -> Sums:
        local = functools.partial(_sums, sums_of, chunk, devices, head_lies)
        return per_device(local, in_specs, partition_spec(()))(head, x_BTD, targets_BT, weights_BT)

    def forward(head: Head, x_BTD: jax.Array) -> tuple[Sums, Any]:
        local = functools.partial(_sums_and_gradients, sums_of, chunk, devices, head_lies)
        spread = per_device(local, in_specs, (partition_spec(()), head_lies, x_lies))
        sums, *gradients = spread(head, x_BTD, targets_BT, weights_BT)
        return sums, tuple(gradients)

    def backward(gradients: Any, cotangent: Sums) -> Any:
        return jax.tree.map(lambda gradient: (gradient * cotangent.loss).astype(gradient.dtype), gradients)

    total.defvjp(forward, backward)
    return total(head, x_BTD)


def _sums(
    sums_of: Callable[..., Sums], chunk: int, devices: tuple[str, ...], head_lies: Any, head: Head, *tokens: jax.Array
) -> Sums:
    """The sums of all devices."""
    head = all_gather(head, head_lies)

    def body(sums: Sums, inputs: Any) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, sums, sums_of(head, *inputs)), None

    sums, _ = jax.lax.scan(body, _zero_sums(), tuple(_split(x, chunk) for x in tokens))
    return jax.lax.psum(sums, devices)


def _sums_and_gradients(
    sums_of: Callable[..., Sums], chunk: int, devices: tuple[str, ...], head_lies: Any, head: Head, *tokens: jax.Array
) -> tuple[Sums, Head, jax.Array]:
    """The sums of all devices, with the loss's gradients with respect to the head and x_BTD, taken chunk by chunk.

    Devices along `tensor` compute one loss together; a gradient inside is that of the sum of all their losses.
    """
    head = all_gather(head, head_lies)

    def loss(head: Head, *inputs: Any) -> tuple[jax.Array, Sums]:
        sums = sums_of(head, *inputs)
        return sums.loss / shards("vocab"), sums

    def body(carry: Any, inputs: Any) -> tuple[Any, jax.Array]:
        sums, head_gradient = carry
        (_, more), (dhead, dx) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(head, *inputs)
        return jax.tree.map(jnp.add, (sums, head_gradient), (more, dhead)), dx

    start = (_zero_sums(), jax.tree.map(jnp.zeros_like, head))
    (sums, head_gradient), dx = jax.lax.scan(body, start, tuple(_split(x, chunk) for x in tokens))
    dx_BTD = jax.lax.psum(_joined(dx, tokens[0].shape[1]), mesh_axes("vocab"))
    return jax.lax.psum(sums, devices), reduce_scatter(head_gradient, head_lies, devices), dx_BTD


def token_logprobs(
    unembed: Unembed, head: Head, x_BTD: jax.Array, targets_BT: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(log p(target), whether no token was more probable), both float32 [B, T], chunk by chunk."""
    local = functools.partial(_token_logprobs, unembed, specs_of(head), chunk=chunk)
    in_specs = (specs_of(head), partition_spec((*_TOKENS, None)), partition_spec(_TOKENS))
    return per_device(local, in_specs, (partition_spec(_TOKENS), partition_spec(_TOKENS)))(head, x_BTD, targets_BT)


def _token_logprobs(
    unembed: Unembed, head_lies: Any, head: Head, x_BTD: jax.Array, targets_BT: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    head = all_gather(head, head_lies)

    @jax.checkpoint
    def score(x_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = unembed(head, x_BCD)
        correct_BC = _of_targets(logits_BCV, targets_BC) >= _max(logits_BCV)
        return -negative_log_likelihood(logits_BCV, targets_BC), correct_BC.astype(jnp.float32)

    scores = jax.lax.map(lambda inputs: score(*inputs), (_split(x_BTD, chunk), _split(targets_BT, chunk)))
    logprobs_BT, correct_BT = (_joined(x, targets_BT.shape[1]) for x in scores)
    return logprobs_BT, correct_BT


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, C, ...] with C of at most `chunk` tokens, the end padded with zeros."""
    B, T = x.shape[:2]
    chunks = -(-T // chunk)
    chunk = -(-T // chunks)
    padded = jnp.pad(x, [(0, 0), (0, chunks * chunk - T)] + [(0, 0)] * (x.ndim - 2))
    return padded.reshape(B, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)


def _joined(x: jax.Array, T: int) -> jax.Array:
    """[chunks, B, chunk, ...] -> [B, T, ...], without the padding."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :T]


def _zero_sums() -> Sums:
    return Sums(*(jnp.zeros(()) for _ in Sums._fields))
