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
from jax.sharding import PartitionSpec

from lmjax.layout import RULES, current_mesh, mesh_axes, per_device

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
    return jax.nn.logsumexp(logits_BTV, axis=-1) - _of_targets(logits_BTV, targets_BT)


# What each token adds to the loss: (float32 logits_BTV, targets_BT) -> [B, T].
TOKEN_LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "cross_entropy": negative_log_likelihood,
}


def token_sums(
    logits_BTV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_weight: float = 0.0,
    token_loss: str = "cross_entropy",
) -> Sums:
    """Weighted sums over tokens; z_weight * logsumexp(logits)^2 is PaLM's z-loss (arXiv:2204.02311, section 5).

    The likelihood is measured whatever loss is minimized, so that runs stay comparable.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    nll_BT = negative_log_likelihood(logits_BTV, targets_BT)
    z_loss_BT = z_weight * jnp.square(jax.nn.logsumexp(logits_BTV, axis=-1))
    correct_BT = _of_targets(logits_BTV, targets_BT) >= jnp.max(logits_BTV, axis=-1)
    loss_BT = TOKEN_LOSSES[token_loss](logits_BTV, targets_BT) + z_loss_BT
    return Sums(*(jnp.sum(x_BT * weights_BT) for x_BT in (loss_BT, nll_BT, z_loss_BT, correct_BT)))


def _of_targets(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    if current_mesh() is None:
        return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    # The vocabulary may be split over devices: only one of them has the target, and a sum finds it.
    ids_V = jax.sharding.reshard(
        jnp.arange(logits_BTV.shape[-1]), PartitionSpec(jax.typeof(logits_BTV).sharding.spec[-1])
    )
    return jnp.sum(jnp.where(targets_BT[..., None] == ids_V, logits_BTV, 0), axis=-1)


def chunked_token_sums(
    unembed: Unembed,
    head: Head,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int,
    z_weight: float = 0.0,
    token_loss: str = "cross_entropy",
) -> Sums:
    """`token_sums(unembed(head, x), ...)` with logits for `chunk` positions of every row at a time.

    Only `loss` is differentiable. T need not be a multiple of the chunk: what is missing is padded with weight 0.
    On a mesh every device cuts its own tokens into chunks, and the gradients of the head, which is whole along fsdp and
    context, add up over devices once, after the last chunk.
    """
    local = functools.partial(_chunked_token_sums, unembed, chunk=chunk, z_weight=z_weight, token_loss=token_loss)
    if current_mesh() is None:
        return local(head, x_BTD, targets_BT, weights_BT)
    over = mesh_axes("batch") + mesh_axes("time")

    def summed(*arrays: Any) -> Sums:
        return jax.lax.psum(local(*arrays), over)

    in_names = ((), (*_TOKENS, None), _TOKENS, _TOKENS)
    return per_device(summed, in_names, (), but=RULES["vocab"])(head, x_BTD, targets_BT, weights_BT)


def _chunked_token_sums(
    unembed: Unembed,
    head: Head,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int,
    z_weight: float,
    token_loss: str,
) -> Sums:
    def sums_of(head: Head, x_BCD: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array) -> Sums:
        return token_sums(unembed(head, x_BCD), targets_BC, weights_BC, z_weight, token_loss)

    if chunk >= x_BTD.shape[1]:
        return sums_of(head, x_BTD, targets_BT, weights_BT)
    return _sum_over_chunks(sums_of, head, *(_split(x, chunk) for x in (x_BTD, targets_BT, weights_BT)))


def token_logprobs(
    unembed: Unembed, head: Head, x_BTD: jax.Array, targets_BT: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(log p(target), whether no token was more probable), both float32 [B, T], chunk by chunk."""
    local = functools.partial(_token_logprobs, unembed, chunk=chunk)
    in_names = ((), (*_TOKENS, None), _TOKENS)
    return per_device(local, in_names, _TOKENS, but=RULES["vocab"])(head, x_BTD, targets_BT)


def _token_logprobs(
    unembed: Unembed, head: Head, x_BTD: jax.Array, targets_BT: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    @jax.checkpoint
    def score(x_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = unembed(head, x_BCD)
        correct_BC = _of_targets(logits_BCV, targets_BC) >= jnp.max(logits_BCV, axis=-1)
        return -negative_log_likelihood(logits_BCV, targets_BC), correct_BC.astype(jnp.float32)

    scores = jax.lax.map(lambda inputs: score(*inputs), (_split(x_BTD, chunk), _split(targets_BT, chunk)))
    B, T = targets_BT.shape
    logprobs_BT, correct_BT = (x.swapaxes(0, 1).reshape(B, -1)[:, :T] for x in scores)
    return logprobs_BT, correct_BT


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, chunk, ...], the end padded with zeros."""
    B, T = x.shape[:2]
    chunks = -(-T // chunk)
    padded = jnp.pad(x, [(0, 0), (0, chunks * chunk - T)] + [(0, 0)] * (x.ndim - 2))
    return padded.reshape(B, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)


def _sum_over_chunks(
    sums_of: Callable[..., Sums], head: Head, x: jax.Array, targets: jax.Array, weights: jax.Array
) -> Sums:
    """Sum `sums_of` over the leading axis, with gradients with respect to `head` and `x` taken chunk by chunk."""

    @jax.custom_vjp
    def total(head: Head, x: jax.Array) -> Sums:
        def body(sums: Sums, inputs: Any) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, sums, sums_of(head, *inputs)), None

        return jax.lax.scan(body, _zero_sums(), (x, targets, weights))[0]

    def forward(head: Head, x: jax.Array) -> tuple[Sums, Any]:
        def loss(head: Head, *inputs: Any) -> tuple[jax.Array, Sums]:
            sums = sums_of(head, *inputs)
            return sums.loss, sums

        def body(carry: Any, inputs: Any) -> tuple[Any, jax.Array]:
            sums, head_gradient = carry
            (_, more), (dhead, dx) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(head, *inputs)
            return jax.tree.map(jnp.add, (sums, head_gradient), (more, dhead)), dx

        start = (_zero_sums(), jax.tree.map(jnp.zeros_like, head))
        (sums, head_gradient), dx = jax.lax.scan(body, start, (x, targets, weights))
        return sums, (head_gradient, dx)

    def backward(saved: Any, cotangent: Sums) -> Any:
        return jax.tree.map(lambda gradient: (gradient * cotangent.loss).astype(gradient.dtype), saved)

    total.defvjp(forward, backward)
    return total(head, x)


def _zero_sums() -> Sums:
    return Sums(*(jnp.zeros(()) for _ in Sums._fields))
