"""From logits to a token: pure functions logits_BV -> logits_BV, and the draw.

What each function keeps, and their order in `sample`, are those of Hugging Face's logits processors, so that texts and
settings can be compared. A token is ruled out by the logit -inf.
"""

import jax
import jax.numpy as jnp

from lmjax.generate.config import GenerateConfig


def penalize_repetition(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Divide positive logits of tokens already seen by the penalty, multiply negative ones (CTRL, arXiv:1909.05858)."""
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def scale_by_temperature(logits_BV: jax.Array, temperature: float) -> jax.Array:
    return logits_BV / temperature


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """The k largest logits (Fan et al. 2018, arXiv:1805.04833), and those equal to the last of them."""
    return _keep_while_above(logits_BV, jnp.ones_like(logits_BV), k)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """The nucleus (Holtzman et al. 2020, arXiv:1904.09751).

    A token stays if all more probable ones together hold less than `p`; so the most probable one always does.
    """
    return _keep_while_above(logits_BV, jax.nn.softmax(logits_BV, axis=-1), p)


def _keep_while_above(logits_BV: jax.Array, weights_BV: jax.Array, limit: float) -> jax.Array:
    """Keep a token if the weights of all larger logits sum to less than `limit`.

    The smallest logit kept is found by bisection on ranks: exact after 32 sums. Sorting a vocabulary takes longer than
    the rest of a small model's step.
    """
    rank_BV = _rank(logits_BV)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B1, high_B1 = bounds  # above `low` lies at least `limit`, above `high` less
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)  # their mean, without overflow
        above_B1 = jnp.sum(jnp.where(rank_BV > middle_B1, weights_BV, 0), axis=-1, keepdims=True)
        return jnp.where(above_B1 < limit, low_B1, middle_B1), jnp.where(above_B1 < limit, middle_B1, high_B1)

    high_B1 = jnp.max(rank_BV, axis=-1, keepdims=True)
    low_B1 = jnp.full_like(high_B1, jnp.iinfo(jnp.int32).min)
    _, least_B1 = jax.lax.fori_loop(0, 32, halve, (low_B1, high_B1))
    return _keep(logits_BV, rank_BV >= least_B1)


def _rank(logits_BV: jax.Array) -> jax.Array:
    """Integers in the order of float32 logits: their bits, once the sign is taken out. 0 and -0 are equal."""
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    return jnp.where(bits_BV < 0, -(bits_BV & jnp.iinfo(jnp.int32).max), bits_BV)


def largest(logits_BV: jax.Array) -> jax.Array:
    """argmax, int32 [B], the first of equal ones. XLA's CPU backend finds it with vector instructions among integers
    only: in a seventh of the time."""
    rank_BV, V = _rank(logits_BV), logits_BV.shape[1]
    ids_BV = jax.lax.broadcasted_iota(jnp.int32, rank_BV.shape, 1)
    return jnp.min(jnp.where(rank_BV == jnp.max(rank_BV, axis=1, keepdims=True), ids_BV, V), axis=1)


def keep_min_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Tokens at least `p` times as probable as the most probable one (Nguyen et al. 2024, arXiv:2407.01082)."""
    probabilities_BV = jax.nn.softmax(logits_BV, axis=-1)
    return _keep(logits_BV, probabilities_BV >= p * jnp.max(probabilities_BV, axis=-1, keepdims=True))


def _keep(logits_BV: jax.Array, kept_BV: jax.Array) -> jax.Array:
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def sample(logits_BV: jax.Array, keys_B: jax.Array, cfg: GenerateConfig, seen_BV: jax.Array | None) -> jax.Array:
    """The next token of every row, int32 [B]; the most probable one at temperature 0.

    Each row draws with its own key, so its text does not depend on its neighbours. `seen_BV` marks the tokens already
    in each row's prompt and text; only a repetition penalty reads it.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if cfg.repetition_penalty != 1:
        assert seen_BV is not None
        logits_BV = penalize_repetition(logits_BV, seen_BV, cfg.repetition_penalty)
    if cfg.temperature == 0:
        return largest(logits_BV)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    return largest(truncate(logits_BV, cfg) + noise_BV)  # the draw of `jax.random.categorical`


def truncate(logits_BV: jax.Array, cfg: GenerateConfig) -> jax.Array:
    """The logits that tokens are drawn from: temperature, then top-k, top-p and min-p, each of what the last left."""
    logits_BV = scale_by_temperature(logits_BV, cfg.temperature)
    if cfg.top_k is not None:
        logits_BV = keep_top_k(logits_BV, cfg.top_k)
    if cfg.top_p < 1:
        logits_BV = keep_top_p(logits_BV, cfg.top_p)
    if cfg.min_p > 0:
        logits_BV = keep_min_p(logits_BV, cfg.min_p)
    return logits_BV
