"""Texts longer than a learned table of positions, for models that have one."""

import dataclasses
from collections.abc import Sequence

from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate
from lmjax.models.model import Model
from lmjax.weights import Params

Prompt = str | Sequence[int]
"""A text, or ids that are read as they are."""


def generate_past(
    model: Model, params: Params, tokenizer: Tokenizer, prompts: Sequence[Prompt], cfg: GenerateConfig, *, context: int
) -> list[str]:
    """What follows every prompt, read at most `context` tokens at a time; `generate`'s text where all of it fits.

    Where the table ends, the model goes on from the newest half of it. So each token is chosen with between half a
    table and a whole one before it; nanoGPT, which reads everything again for every token, always has a whole one.
    """
    read = [_read(tokenizer, prompt) for prompt in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    open_rows, piece = list(range(len(prompts))), 0
    while open_rows:
        rows = [read[row] + written[row] for row in open_rows]
        if max(map(len, rows)) >= context:
            rows = [ids[-max(1, context // 2) :] for ids in rows]
        left = cfg.tokens - len(written[open_rows[0]])
        settings = dataclasses.replace(
            cfg, tokens=max(1, min(left, context - max(map(len, rows)))), seed=cfg.seed + piece
        )
        found = generate(model, params, tokenizer, rows, settings)
        for row, one in zip(open_rows, found, strict=True):
            written[row] += one.ids
        done = left == settings.tokens
        open_rows = [] if done else [row for row, one in zip(open_rows, found, strict=True) if not one.finished]
        piece += 1
    return [_spelled(tokenizer, prompt, ids) for prompt, ids in zip(prompts, written, strict=True)]


def _read(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    return (begin + tokenizer.encode(prompt)) or [tokenizer.endoftext_id]


def _spelled(tokenizer: Tokenizer, prompt: Prompt, ids: list[int]) -> str:
    """Decoding an opening takes away what encoding puts in front of a text."""
    spelled = tokenizer.decode_bytes(ids)
    return (spelled if prompt else spelled.removeprefix(tokenizer.prefix)).decode("utf-8", errors="replace")
