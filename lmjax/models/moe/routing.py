"""Which experts a token goes to, and what is counted about that.

A sequence is routed by itself, and its balance loss is weighed by its tokens, so neither microbatches nor a mesh can
change it. The legend of letters is in lmjax/models/model.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.models.config import MoeConfig


class Routing(NamedTuple):
    chosen_BTX: jax.Array
    """int32, the experts of each token, the highest score first."""
    weights_BTX: jax.Array
    """float32, what each one's output is multiplied by."""
    real_BT: jax.Array
    """Which tokens are not padding."""
    counted_BT: jax.Array
    """Which of them losses and metrics are about: all but those of a soft prompt."""


class Tally(NamedTuple):
    """What the router of one layer did, summed over the tokens that are counted."""

    load_E: jax.Array
    """How many tokens chose each expert."""
    balance: jax.Array
    """The sum of each sequence's balance loss times its tokens."""
    router_z: jax.Array
    """logsumexp(logits)^2."""
    dropped: jax.Array
    """Choices that found no room."""


def score(logits_BTE: jax.Array, moe: MoeConfig) -> jax.Array:
    """Router logits -> scores_BTE: a softmax over all experts, or a sigmoid for each expert."""
    return jax.nn.softmax(logits_BTE, axis=-1) if moe.score == "softmax" else jax.nn.sigmoid(logits_BTE)


def choose(scores_BTE: jax.Array, bias_E: jax.Array | None, real_BT: jax.Array, moe: MoeConfig) -> Routing:
    """The `top_k` highest scores. On a tie the expert of lower index is chosen.

    A bias changes which experts are chosen, but not their weights (arXiv:2408.15664, equation 3).
    """
    ranked_BTE = scores_BTE if bias_E is None else scores_BTE + bias_E
    _, chosen_BTX = jax.lax.top_k(jax.lax.stop_gradient(ranked_BTE), moe.top_k)
    weights_BTX = jnp.take_along_axis(scores_BTE, chosen_BTX, axis=-1)
    if moe.normalize:
        weights_BTX /= weights_BTX.sum(axis=-1, keepdims=True) + 1e-20  # all sigmoids may be zero
    return Routing(chosen_BTX, weights_BTX * moe.scale, real_BT, real_BT)


def observe(
    logits_BTE: jax.Array,
    scores_BTE: jax.Array,
    routing: Routing,
    dropped: jax.Array,
    moe: MoeConfig,
    shared_by: tuple[str, ...] = (),
) -> Tally:
    """Sums for the auxiliary losses and the metrics; rows are sharded along the mesh axes `shared_by`.

    The balance loss of a sequence is E sum_e f_e P_e, with f_e the share of its choices that fell on expert e and P_e
    its mean probability: Switch (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6) for several choices, and as in
    DeepSeek-V3 (arXiv:2412.19437, equations 17 to 20) by sequence, sigmoids divided by their sum. 1 is balance.
    The z-loss is that of ST-MoE (Zoph et al. 2022, arXiv:2202.08906, equation 5).
    """
    E, X = scores_BTE.shape[-1], moe.top_k
    counted_BT1 = routing.counted_BT[..., None]
    probabilities_BTE = scores_BTE / (scores_BTE.sum(axis=-1, keepdims=True) + 1e-20)

    def of_row(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, shared_by)

    load_BE = of_row(jnp.sum(jax.nn.one_hot(routing.chosen_BTX, E).sum(axis=2) * counted_BT1, axis=1))
    probability_BE = of_row(jnp.sum(probabilities_BTE * counted_BT1, axis=1))
    tokens_B = jnp.maximum(of_row(routing.counted_BT.sum(axis=1)), 1)
    balance_B = E / X * jnp.sum(load_BE * probability_BE, axis=-1) / tokens_B
    router_z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * routing.counted_BT
    return Tally(load_BE.sum(axis=0), balance_B.sum(), of_row(router_z_BT.sum()), dropped)
