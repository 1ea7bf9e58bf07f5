"""Which backend a model attends by, and why by no faster one, in words: for the log of a run and for --dry-run."""

from typing import Any

import jax
import jax.numpy as jnp

from lmjax.models import front
from lmjax.models.attention.attention import Choice, choose
from lmjax.models.attention.mixer import ATTENTION, score_of
from lmjax.models.attention.scores import Mask
from lmjax.models.config import ModelConfig
from lmjax.models.dropout import PairDropout
from lmjax.models.mixers import MIXERS
from lmjax.weights import Params


def describe(params: Params, T: int, *, cfg: ModelConfig, apart: bool) -> str:
    """`triton, for cudnn cannot keep documents apart`, of training on rows of T tokens; where kinds of layers differ,
    `local: ..., global: ...`. Empty for a model without attention. Call it in the mesh.

    `params` may be shapes. `apart`: documents that share a row do not see each other.
    """
    P, has_prompt = front.places(params), front.has_prompt(params)
    T, by_position = T + P * has_prompt, P > 0 and (apart or not has_prompt)
    rows_1T: Any = jax.ShapeDtypeStruct((1, T), jnp.int32)
    mask = Mask(None, rows_1T if apart else None, key_positions_BS=rows_1T if by_position else None)
    q_1TNH: Any = jax.ShapeDtypeStruct((1, T, cfg.heads, cfg.dims["head_dim"]), cfg.dtype)
    score = score_of(cfg, PairDropout(cfg.attention_dropout, jnp.zeros(1)) if cfg.attention_dropout else None)
    said = {
        kind.mixer: _in_words(choose(q_1TNH, mask._replace(window=cfg.window_of(kind)), score, cfg.attention))
        for kind in cfg.kinds
        if MIXERS[kind.mixer] is ATTENTION
    }
    if len({*said.values()}) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{kind}: {words}" for kind, words in said.items())


def _in_words(choice: Choice) -> str:
    reasons = [f"{name} {lack}" for name, lack in choice.passed_over.items()]
    return f"{choice.backend}, for {', and '.join(reasons)}" if reasons else choice.backend
