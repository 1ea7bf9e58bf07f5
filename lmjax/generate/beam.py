"""Beam search: the texts of (nearly) highest probability, in one compiled program.

Alive hypotheses, W for each prompt, grow; those that chose a stop token move to
the finished ones, of which the W best are kept. They compete by the score of Wu et al. 2016 (arXiv:1609.08144, eq. 14,
without coverage): log p / ((5 + length) / 6)^length_penalty, the stop token counted in both.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from lmjax.generate.config import GenerateConfig
from lmjax.generate.forward import Functions, Memory, prefill, step, take_rows
from lmjax.generate.spread import replicate
from lmjax.weights import Params


@flax.struct.dataclass
class Beams:
    memory: Memory
    """The cache of the B * W alive hypotheses, without their newest tokens."""
    alive_ids_BWZ: jax.Array
    alive_logp_BW: jax.Array
    finished_ids_BWZ: jax.Array
    finished_score_BW: jax.Array
    length: jax.Array
    """New tokens of every alive hypothesis."""


@functools.partial(jax.jit, static_argnums=0, static_argnames="cfg")
def beam_search(
    model: Functions,
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    stop_ids: jax.Array,
    *,
    cfg: GenerateConfig,
) -> tuple[jax.Array, jax.Array]:
    """Continue prompts, padded at their ends -> (best texts, int32 [B, tokens] ending in a stop token; scores, [B]).

    A hypothesis finishes if a stop token is among its prompt's W best candidates, as in Hugging Face. The search ends
    when no alive hypothesis can beat a finished one whatever follows. Whoever is alive after the last token counts as
    finished.
    """
    B, W, Z = len(tokens_BT), cfg.beams, cfg.tokens

    def unfinished(beams: Beams) -> jax.Array:
        # log p only falls, and the penalty is largest for the longest text.
        attainable_B = beams.alive_logp_BW.max(axis=1) / _penalty(Z, cfg)
        return (beams.length < Z) & jnp.any(attainable_B > beams.finished_score_BW.min(axis=1))

    def body(beams: Beams) -> Beams:
        token_BW = jax.lax.dynamic_index_in_dim(beams.alive_ids_BWZ, beams.length - 1, axis=2, keepdims=False)
        positions = jnp.repeat(lengths_B + beams.length - 1, W)
        logits, memory = step(model, params, beams.memory, token_BW.reshape(B * W), positions)
        return _grow(dataclasses.replace(beams, memory=memory), logits.reshape(B, W, -1), stop_ids, cfg)

    logits_BV, memory = prefill(model, params, tokens_BT, lengths_B, Z)
    nothing_BWZ = jnp.full((B, W, Z), stop_ids[0], jnp.int32)
    none_BW = jnp.full((B, W), -jnp.inf)
    start = Beams(
        memory=take_rows(memory, jnp.repeat(jnp.arange(B), W)),
        alive_ids_BWZ=nothing_BWZ,
        alive_logp_BW=none_BW.at[:, 0].set(0),  # W times the same prompt would be W times the same text
        finished_ids_BWZ=nothing_BWZ,
        finished_score_BW=none_BW,
        length=jnp.zeros((), jnp.int32),
    )
    logits_BWV = jnp.repeat(logits_BV[:, None], W, axis=1)
    beams = jax.lax.while_loop(unfinished, body, _grow(start, logits_BWV, stop_ids, cfg))
    return replicate(_best(beams, cfg))


def _grow(beams: Beams, logits_BWV: jax.Array, stop_ids: jax.Array, cfg: GenerateConfig) -> Beams:
    """Every hypothesis with every next token; the best go on, and those that stop are finished."""
    B, W, V = logits_BWV.shape
    length = beams.length + 1
    logp_BWV = beams.alive_logp_BW[:, :, None] + jax.nn.log_softmax(logits_BWV.astype(jnp.float32), axis=-1)
    # Each hypothesis has as many ways to stop as there are stop tokens, so W of so many times W more are sure to go on.
    candidates = min((len(stop_ids) + 1) * W, W * V)
    logp_BY, candidates_BY = jax.lax.top_k(logp_BWV.reshape(B, W * V), candidates)
    parents_BY, tokens_BY = candidates_BY // V, candidates_BY % V
    ids_BYZ = jnp.take_along_axis(beams.alive_ids_BWZ, parents_BY[:, :, None], axis=1)
    ids_BYZ = jax.lax.dynamic_update_slice(ids_BYZ, tokens_BY[:, :, None].astype(jnp.int32), (0, 0, beams.length))

    stops_BY = jnp.isin(tokens_BY, stop_ids)
    ends_BY = stops_BY & (jnp.arange(stops_BY.shape[1]) < W)
    finished_ids_BWZ, finished_score_BW, _ = _keep_best(
        jnp.concatenate([beams.finished_ids_BWZ, ids_BYZ], axis=1),
        jnp.concatenate(
            [beams.finished_score_BW, jnp.where(ends_BY, logp_BY / _penalty(length, cfg), -jnp.inf)], axis=1
        ),
        W,
    )
    alive_ids_BWZ, alive_logp_BW, kept_BW = _keep_best(ids_BYZ, jnp.where(stops_BY, -jnp.inf, logp_BY), W)
    parents_BW = jnp.take_along_axis(parents_BY, kept_BW, axis=1)
    rows_BW = parents_BW + W * jnp.arange(B)[:, None]
    return Beams(
        take_rows(beams.memory, rows_BW.reshape(B * W)),
        alive_ids_BWZ,
        alive_logp_BW,
        finished_ids_BWZ,
        finished_score_BW,
        length,
    )


def _keep_best(ids_BYZ: jax.Array, score_BY: jax.Array, W: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids, scores and indices) of the W best candidates, best first."""
    score_BW, kept_BW = jax.lax.top_k(score_BY, W)
    return jnp.take_along_axis(ids_BYZ, kept_BW[:, :, None], axis=1), score_BW, kept_BW


def _best(beams: Beams, cfg: GenerateConfig) -> tuple[jax.Array, jax.Array]:
    ids_BZ, score_B, _ = _keep_best(
        jnp.concatenate([beams.finished_ids_BWZ, beams.alive_ids_BWZ], axis=1),
        jnp.concatenate([beams.finished_score_BW, beams.alive_logp_BW / _penalty(beams.length, cfg)], axis=1),
        1,
    )
    return ids_BZ[:, 0], score_B[:, 0]


def _penalty(length: int | jax.Array, cfg: GenerateConfig) -> jax.Array:
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** cfg.length_penalty
