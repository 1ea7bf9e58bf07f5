"""Losses of next-token prediction, on arrays alone.

The logits of a batch, [B, T, V] in float32, would be the largest array of a training step. `chunked_token_sums`
holds them for a few positions at a time and takes the gradient of each chunk while its logits exist, so nothing is
computed twice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.devices.gather import all_gather, per_device, reduce_scatter
from lmjax.devices.mesh import current_mesh, mesh_axes, partition_spec, shards, specs_of
from lmjax.errors import ConfigError
from lmjax.models.model import Unembed

_TOKENS = ("batch", "time")

Head = Any


class Sums(NamedTuple):
    """Weighted sums over tokens; divide by the sum of weights."""

    minimized: jax.Array
    """The token loss and the z-loss."""
    nll: jax.Array
    """-log p(target), nats: the `loss` that is logged, whatever is minimized."""
    z_loss: jax.Array
    correct: jax.Array
    """Targets that have the highest probability; a tie counts, so constant logits are all correct."""


def negative_log_likelihood(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], nats, [B, T]."""
    return _logsumexp(logits_BTV) - _of_targets(logits_BTV, targets_BT)


# What each token adds to the loss: (float32 logits_BTV, targets_BT) -> [B, T]. Where logits are sharded along the
# vocabulary, the first works on the shards, and all others are given logits that were all-gathered.
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
        loss_BT = TOKEN_LOSSES[token_loss](_all_gathered(logits_BTV), targets_BT)
    z_loss_BT = z_weight * jnp.square(_logsumexp(logits_BTV))
    correct_BT = _of_targets(logits_BTV, targets_BT) >= _max(logits_BTV)
    return Sums(*(jnp.sum(x_BT * weights_BT) for x_BT in (loss_BT + z_loss_BT, nll_BT, z_loss_BT, correct_BT)))


# Along the vocabulary, which may be sharded along `tensor` ---------------------------------------------------------


def _logsumexp(logits_BTV: jax.Array) -> jax.Array:
    max_BT = _max(logits_BTV)
    sum_BT = jnp.sum(jnp.exp(logits_BTV - max_BT[..., None]), axis=-1)
    return max_BT + jnp.log(jax.lax.psum(sum_BT, mesh_axes("vocab")))


def _max(logits_BTV: jax.Array) -> jax.Array:
    """The largest logit; no gradient flows through it."""
    return jax.lax.pmax(jnp.max(jax.lax.stop_gradient(logits_BTV), axis=-1), mesh_axes("vocab"))


def _of_targets(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    axes = mesh_axes("vocab")
    if not axes:
        return _picked(logits_BTV, targets_BT)
    V = logits_BTV.shape[-1]
    ids_V = V * jax.lax.axis_index(axes) + jnp.arange(V)
    return jax.lax.psum(jnp.sum(jnp.where(targets_BT[..., None] == ids_V, logits_BTV, 0), axis=-1), axes)


def _picked(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """logits[target], [B, T]. Its gradient is a comparison, which XLA merges into the pass that makes the logits'
    gradient, where that of an index would be a scatter into an array of zeros of their size."""

    @jax.custom_vjp
    def picked(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]

    def backward(targets_BT: jax.Array, gradient_BT: jax.Array) -> tuple[jax.Array, None]:
        ids_V = jnp.arange(logits_BTV.shape[-1])
        return jnp.where(targets_BT[..., None] == ids_V, gradient_BT[..., None], 0), None

    picked.defvjp(lambda logits_BTV, targets_BT: (picked(logits_BTV, targets_BT), targets_BT), backward)
    return picked(logits_BTV, targets_BT)


def _all_gathered(logits_BTV: jax.Array) -> jax.Array:
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

    Only `minimized` is differentiable, and only with respect to `head` and `x_BTD`. All chunks have the same size: the
    last one is padded with tokens of weight 0. On a mesh every device cuts its own tokens into chunks. It all-gathers
    the head once, before the first chunk, and the head's gradients are added up over devices once, after the last one.
    A compiled program does not depend on the value of a `z_weight` that is a traced scalar.
    """
    if current_mesh() is None and chunk >= x_BTD.shape[1]:
        return token_sums(unembed(head, x_BTD), targets_BT, weights_BT, z_weight, token_loss)
    devices = mesh_axes("batch") + mesh_axes("time")
    loss = _ChunkedLoss(unembed, token_loss, chunk, specs_of(head), devices)
    total = jax.custom_vjp(loss.total)
    total.defvjp(loss.forward, loss.backward)
    return total(head, z_weight, x_BTD, targets_BT, weights_BT)


@dataclasses.dataclass(frozen=True, eq=False)
class _ChunkedLoss:
    """The fields are what is known when a program is traced. The methods take the head, z_weight, x_BTD, targets_BT and
    weights_BT: `total`, `forward` and `backward` of all devices, the others of one device's own tokens.
    """

    unembed: Unembed
    token_loss: str
    chunk: int
    head_specs: Any
    """A tree of PartitionSpec, or None without a mesh."""
    devices: tuple[str, ...]
    """The mesh axes along which devices hold different tokens."""

    @property
    def in_specs(self) -> tuple[Any, ...]:
        tokens_spec = partition_spec(_TOKENS)
        return self.head_specs, partition_spec(()), partition_spec((*_TOKENS, None)), tokens_spec, tokens_spec

    def total(
        self, head: Head, z_weight: jax.Array, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
    ) -> Sums:
        sums = per_device(self._sums, self.in_specs, partition_spec(()))
        return sums(head, z_weight, x_BTD, targets_BT, weights_BT)

    def forward(
        self, head: Head, z_weight: jax.Array, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
    ) -> tuple[Sums, Any]:
        """The sums, and what `backward` needs: the gradients, taken while the logits of each chunk exist."""
        head_specs, _, x_spec, *_ = self.in_specs
        sums_and_gradients = per_device(
            self._sums_and_gradients, self.in_specs, (partition_spec(()), (head_specs, x_spec))
        )
        return sums_and_gradients(head, z_weight, x_BTD, targets_BT, weights_BT)

    def backward(self, gradients: Any, cotangent: Sums) -> tuple[Head, None, jax.Array, None, None]:
        dhead, dx_BTD = jax.tree.map(lambda dx: (dx * cotangent.minimized).astype(dx.dtype), gradients)
        return dhead, None, dx_BTD, None, None

    def _sums(self, head: Head, z_weight: jax.Array, *tokens: jax.Array) -> Sums:
        """The sums over the tokens of all devices."""
        head = all_gather(head, self.head_specs)

        def add_chunk(sums: Sums, chunk: Any) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, sums, self._of_chunk(head, z_weight, *chunk)), None

        sums, _ = jax.lax.scan(add_chunk, _zero_sums(), tuple(_split(x, self.chunk) for x in tokens))
        return jax.lax.psum(sums, self.devices)

    def _sums_and_gradients(
        self, head: Head, z_weight: jax.Array, *tokens: jax.Array
    ) -> tuple[Sums, tuple[Head, jax.Array]]:
        """The sums over the tokens of all devices, and the gradients of `minimized` by the head and x_BTD."""
        head = all_gather(head, self.head_specs)

        def minimized(head: Head, x_BCD: jax.Array, *targets_and_weights: jax.Array) -> tuple[jax.Array, Sums]:
            sums = self._of_chunk(head, z_weight, x_BCD, *targets_and_weights)
            # Devices along `tensor` compute one loss together, and jax differentiates the sum of all their losses.
            return sums.minimized / shards("vocab"), sums

        def add_chunk(total: Any, chunk: Any) -> tuple[Any, jax.Array]:
            (_, sums), (dhead, dx_BCD) = jax.value_and_grad(minimized, argnums=(0, 1), has_aux=True)(head, *chunk)
            return jax.tree.map(jnp.add, total, (sums, dhead)), dx_BCD

        zero = (_zero_sums(), jax.tree.map(jnp.zeros_like, head))
        (sums, dhead), dx = jax.lax.scan(add_chunk, zero, tuple(_split(x, self.chunk) for x in tokens))
        dx_BTD = jax.lax.psum(_joined(dx, tokens[0].shape[1]), mesh_axes("vocab"))
        devices = self.devices + mesh_axes("vocab")  # along which what is not sharded like the head is shared
        return jax.lax.psum(sums, self.devices), (reduce_scatter(dhead, self.head_specs, devices), dx_BTD)

    def _of_chunk(
        self, head: Head, z_weight: jax.Array, x_BCD: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array
    ) -> Sums:
        return token_sums(self.unembed(head, x_BCD), targets_BC, weights_BC, z_weight, self.token_loss)


def token_logprobs(
    unembed: Unembed, head: Head, x_BTD: jax.Array, targets_BT: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(log p(target), whether no token was more probable), both float32 [B, T], chunk by chunk."""
    local = functools.partial(_token_logprobs, unembed, specs_of(head), chunk=chunk)
    in_specs = (specs_of(head), partition_spec((*_TOKENS, None)), partition_spec(_TOKENS))
    return per_device(local, in_specs, (partition_spec(_TOKENS), partition_spec(_TOKENS)))(head, x_BTD, targets_BT)


def _token_logprobs(
    unembed: Unembed, head_specs: Any, head: Head, x_BTD: jax.Array, targets_BT: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    head = all_gather(head, head_specs)

    @jax.checkpoint
    def score(x_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = unembed(head, x_BCD)
        correct_BC = _of_targets(logits_BCV, targets_BC) >= _max(logits_BCV)
        return -negative_log_likelihood(logits_BCV, targets_BC), correct_BC.astype(jnp.float32)

    scores = jax.lax.map(lambda inputs: score(*inputs), (_split(x_BTD, chunk), _split(targets_BT, chunk)))
    logprobs_BT, correct_BT = (_joined(x, targets_BT.shape[1]) for x in scores)
    return logprobs_BT, correct_BT


# Between two models -----------------------------------------------------------------------------------------------


def forward_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p, q): the student q covers all that the teacher p holds possible."""
    return jnp.exp(log_p) * (log_p - log_q)


def reverse_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(q, p): the student q keeps to what the teacher p holds probable."""
    return jnp.exp(log_q) * (log_q - log_p)


def jensen_shannon(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """The mean of KL(p, m) and KL(q, m), m being halfway between them; at most log 2."""
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    return (forward_kl(log_p, log_m) + forward_kl(log_q, log_m)) / 2


# How far q is from p: log-probabilities [..., V] of both -> terms [..., V], whose sum over the vocabulary it is.
DIVERGENCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}


class Output(NamedTuple):
    """What logits are made of."""

    unembed: Unembed
    head: Head
    x_BTD: jax.Array


class Likeliest(NamedTuple):
    """The K tokens that a model held likeliest to come next, and all others taken as one more, J = K + 1 in all.

    A divergence between such distributions is at most that between whole ones, and 0 where the student has the
    teacher's probabilities. What only K probabilities say, made to sum to 1, is biased: the student learns to be surer
    than its teacher (Anshumann et al. 2025, arXiv:2503.16870).
    """

    tokens_BTK: Any
    logp_BTJ: Any
    """The log-probabilities of these tokens and of all others together."""


def likeliest(output: Output, *, K: int, temperature: float, chunk: int) -> Likeliest:
    """Of a model at this temperature, chunk by chunk."""

    def of_chunk(x_BCD: jax.Array) -> Likeliest:
        logits_BCV = output.unembed(output.head, x_BCD).astype(jnp.float32) / temperature
        log_p_BCV = jax.nn.log_softmax(logits_BCV)
        tokens_BCK = jax.lax.top_k(log_p_BCV, K)[1]
        return Likeliest(tokens_BCK, _with_rest(log_p_BCV, tokens_BCK))

    pieces = jax.lax.map(of_chunk, _split(output.x_BTD, chunk))
    return jax.tree.map(lambda x: _joined(x, output.x_BTD.shape[1]), pieces)


def _with_rest(logp_BCV: jax.Array, tokens_BCK: jax.Array) -> jax.Array:
    """The log-probabilities of some tokens and, last, of all others together."""
    others_BCV = jnp.put_along_axis(logp_BCV, tokens_BCK, -jnp.inf, axis=-1, inplace=False)
    rest_BC1 = jax.nn.logsumexp(others_BCV, axis=-1, keepdims=True)
    return jnp.concatenate([jnp.take_along_axis(logp_BCV, tokens_BCK, axis=-1), rest_BC1], axis=-1)


def token_divergences(
    teacher: Output | Likeliest,
    student: Output,
    targets_BT: jax.Array,
    *,
    divergence: str,
    temperature: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(how far the student's next token is from the teacher's, both at this temperature; the student's log p(target),
    at temperature 1; whether no token was more probable to it), all float32 [B, T], chunk by chunk.

    Of a teacher of whom only the likeliest tokens are known, at this temperature, the rest counts as one token for the
    student, too. Raises ConfigError where devices share the vocabulary.
    """
    if shards("vocab") > 1:
        raise ConfigError("task=distill needs whole vocabularies; use a mesh without tensor")
    known = teacher if isinstance(teacher, Likeliest) else None
    outputs = [student] if isinstance(teacher, Likeliest) else [student, teacher]
    local = functools.partial(
        _token_divergences,
        [output.unembed for output in outputs],
        [specs_of(output.head) for output in outputs],
        DIVERGENCES[divergence],
        temperature,
        chunk,
    )
    tokens, activations = partition_spec(_TOKENS), partition_spec((*_TOKENS, None))
    x = tuple(output.x_BTD for output in outputs), known
    in_specs = tuple(specs_of(output.head) for output in outputs), jax.tree.map(lambda _: activations, x), tokens
    return per_device(local, in_specs, (tokens, tokens, tokens))(tuple(one.head for one in outputs), x, targets_BT)


def _token_divergences(
    unembeds: Any, specs: Any, terms: Any, temperature: float, chunk: int, heads: Any, x: Any, targets_BT: jax.Array
) -> tuple[jax.Array, ...]:
    heads = [all_gather(head, spec) for head, spec in zip(heads, specs, strict=True)]

    @jax.checkpoint
    def score(x: Any, targets_BC: jax.Array) -> tuple[jax.Array, ...]:
        outputs, known = x
        triples = zip(unembeds, heads, outputs, strict=True)
        logits_BCV, *teacher = [unembed(head, x_BCD).astype(jnp.float32) for unembed, head, x_BCD in triples]
        log_q = jax.nn.log_softmax(logits_BCV / temperature)
        if known is None:
            log_p = jax.nn.log_softmax(teacher[0] / temperature)
        else:  # what was rounded is made to sum to 1
            log_p, log_q = jax.nn.log_softmax(known.logp_BTJ), _with_rest(log_q, known.tokens_BTK)
        far_BC = jnp.sum(terms(log_p, log_q), axis=-1)
        correct_BC = _of_targets(logits_BCV, targets_BC) >= _max(logits_BCV)
        return far_BC, -negative_log_likelihood(logits_BCV, targets_BC), correct_BC.astype(jnp.float32)

    pieces = jax.tree.map(lambda one: _split(one, chunk), (x, targets_BT))
    return tuple(_joined(one, targets_BT.shape[1]) for one in jax.lax.map(lambda piece: score(*piece), pieces))


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
