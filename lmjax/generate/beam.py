"""Beam search: the texts of (nearly) highest probability, in one compiled program.

Axes: K hypotheses per prompt, O new tokens, S stop tokens. Alive hypotheses grow; those that chose a stop token move to
the finished ones, of which the K best are kept. They compete by the score of Wu et al. 2016 (arXiv:1609.08144, eq. 14,
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
    """Of the B * K alive hypotheses, without their newest tokens."""
    alive_ids_BKO: jax.Array
    alive_logp_BK: jax.Array
    finished_ids_BKO: jax.Array
    finished_score_BK: jax.Array
    length: jax.Array
    """New tokens of every alive hypothesis."""


@functools.partial(jax.jit, static_argnums=0, static_argnames="cfg")
def beam_search(
    model: Functions,
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    stops_S: jax.Array,
    *,
    cfg: GenerateConfig,
) -> tuple[jax.Array, jax.Array]:
    """Continue prompts, padded at their ends -> (best texts, int32 [B, tokens] ending in a stop token; scores, [B]).

    A hypothesis finishes if a stop token is among its prompt's K best candidates, as in Hugging Face. The search ends
    when no alive hypothesis can beat a finished one whatever follows. Whoever is alive after the last token counts as
    finished.
    """
    B, K, O = len(tokens_BT), cfg.beams, cfg.tokens  # noqa: E741

    def unfinished(beams: Beams) -> jax.Array:
        # log p only falls, and the penalty is largest for the longest text.
        attainable_B = beams.alive_logp_BK.max(axis=1) / _penalty(O, cfg)
        return (beams.length < O) & jnp.any(attainable_B > beams.finished_score_BK.min(axis=1))

    def body(beams: Beams) -> Beams:
        token_BK = jax.lax.dynamic_index_in_dim(beams.alive_ids_BKO, beams.length - 1, axis=2, keepdims=False)
        positions = jnp.repeat(lengths_B + beams.length - 1, K)
        logits, memory = step(model, params, beams.memory, token_BK.reshape(B * K), positions)
        return _grow(dataclasses.replace(beams, memory=memory), logits.reshape(B, K, -1), stops_S, cfg)

    logits_BV, memory = prefill(model, params, tokens_BT, lengths_B, O)
    nothing_BKO = jnp.full((B, K, O), stops_S[0], jnp.int32)
    none_BK = jnp.full((B, K), -jnp.inf)
    start = Beams(
        memory=take_rows(memory, jnp.repeat(jnp.arange(B), K)),
        alive_ids_BKO=nothing_BKO,
        alive_logp_BK=none_BK.at[:, 0].set(0),  # K times the same prompt would be K times the same text
        finished_ids_BKO=nothing_BKO,
        finished_score_BK=none_BK,
        length=jnp.zeros((), jnp.int32),
    )
    logits_BKV = jnp.repeat(logits_BV[:, None], K, axis=1)
    beams = jax.lax.while_loop(unfinished, body, _grow(start, logits_BKV, stops_S, cfg))
    return replicate(_best(beams, cfg))


def _grow(beams: Beams, logits_BKV: jax.Array, stops_S: jax.Array, cfg: GenerateConfig) -> Beams:
    """Every hypothesis with every next token; the best go on, and those that stop are finished."""
    B, K, V = logits_BKV.shape
    length = beams.length + 1
    logp_BKV = beams.alive_logp_BK[:, :, None] + jax.nn.log_softmax(logits_BKV.astype(jnp.float32), axis=-1)
    # Each hypothesis has S ways to stop, so K of the (S + 1) K best are sure to go on.
    candidates = min((len(stops_S) + 1) * K, K * V)
    logp_BC, candidates_BC = jax.lax.top_k(logp_BKV.reshape(B, K * V), candidates)
    parents_BC, tokens_BC = candidates_BC // V, candidates_BC % V
    ids_BCO = jnp.take_along_axis(beams.alive_ids_BKO, parents_BC[:, :, None], axis=1)
    ids_BCO = jax.lax.dynamic_update_slice(ids_BCO, tokens_BC[:, :, None].astype(jnp.int32), (0, 0, beams.length))

    stops_BC = jnp.isin(tokens_BC, stops_S)
    ends_BC = stops_BC & (jnp.arange(stops_BC.shape[1]) < K)
    finished_ids_BKO, finished_score_BK, _ = _keep_best(
        jnp.concatenate([beams.finished_ids_BKO, ids_BCO], axis=1),
        jnp.concatenate(
            [beams.finished_score_BK, jnp.where(ends_BC, logp_BC / _penalty(length, cfg), -jnp.inf)], axis=1
        ),
        K,
    )
    alive_ids_BKO, alive_logp_BK, kept_BK = _keep_best(ids_BCO, jnp.where(stops_BC, -jnp.inf, logp_BC), K)
    parents_BK = jnp.take_along_axis(parents_BC, kept_BK, axis=1)
    rows_BK = parents_BK + K * jnp.arange(B)[:, None]
    return Beams(
        take_rows(beams.memory, rows_BK.reshape(B * K)),
        alive_ids_BKO,
        alive_logp_BK,
        finished_ids_BKO,
        finished_score_BK,
        length,
    )


def _keep_best(ids_BCO: jax.Array, score_BC: jax.Array, K: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids, scores and indices) of the K best candidates, best first."""
    score_BK, kept_BK = jax.lax.top_k(score_BC, K)
    return jnp.take_along_axis(ids_BCO, kept_BK[:, :, None], axis=1), score_BK, kept_BK


def _best(beams: Beams, cfg: GenerateConfig) -> tuple[jax.Array, jax.Array]:
    ids_BO, score_B, _ = _keep_best(
        jnp.concatenate([beams.finished_ids_BKO, beams.alive_ids_BKO], axis=1),
        jnp.concatenate([beams.finished_score_BK, beams.alive_logp_BK / _penalty(beams.length, cfg)], axis=1),
        1,
    )
    return ids_BO[:, 0], score_B[:, 0]


def _penalty(length: int | jax.Array, cfg: GenerateConfig) -> jax.Array:
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** cfg.length_penalty
