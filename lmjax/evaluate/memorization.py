"""How much of its training text does a model know by heart? It reads prefixes of it, and goes on word for word or not.

The measure of Carlini et al. 2022 (arXiv:2202.07646): a piece of text is memorized if greedy decoding after the tokens
before it writes it exactly. That is so if each of its tokens is the most probable one after those before, so that one
forward pass tells. Some text anybody could go on with: what a model says of text that it was not trained on tells how
much of it.
"""

from typing import NamedTuple

import numpy as np

from lmjax.data.store.shards import TokenSplit
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import DataError
from lmjax.evaluate.requests import Request, Scorer, log_likelihoods
from lmjax.evaluate.tasks.forms import Answer
from lmjax.evaluate.tasks.prompt import Item, Prompt
from lmjax.evaluate.tasks.results import Result, digest


class Lengths(NamedTuple):
    """In tokens."""

    prefix: int
    """What the model reads."""
    continuation: int
    """What it is to go on with."""


def ask(scorer: Scorer, split: TokenSplit, lengths: Lengths, *, count: int, seed: int, where: str) -> Result:
    """Put prefixes to a model that are drawn from a split by the seed, at most `count`.

    memorized  the share that it goes on with exactly as the text does
    nll        of the continuations, nats per token

    Raises DataError where no document of `where` is long enough.
    """
    ids_BT = drawn(split, sum(lengths), count=count, seed=seed, where=where)
    tokenizer = scorer.tokenizer
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    pieces = [(ids[: lengths.prefix].tolist(), ids[lengths.prefix :].tolist()) for ids in ids_BT]
    prompts = [_prompt(tokenizer, number, *piece) for number, piece in enumerate(pieces)]
    asked = [
        Request([*begin, *prefix], rest, len(prompt.answer.encode()))
        for (prefix, rest), prompt in zip(pieces, prompts, strict=True)
    ]
    answers = [
        Answer(
            {"memorized": (float(one.greedy), 1.0), "nll": (-one.logprob, float(one.tokens))},
            {"prefix": prompt.context, "continuation": prompt.answer, "logprob": one.logprob},
            one.unread,
        )
        for one, prompt in zip(log_likelihoods(scorer, asked), prompts, strict=True)
    ]
    return Result(prompts, answers, digest(prompts))


def drawn(split: TokenSplit, length: int, *, count: int, seed: int, where: str) -> np.ndarray:
    """Pieces of `length` tokens that lie within documents, each as likely as any other, at most `count` -> ids_BT."""
    places = np.maximum(0, np.diff(split.document_starts) - length)  # a document's last token is its endoftext
    ends = np.cumsum(places)
    if not places.any():
        raise DataError(f"no document of {where} has {length} tokens; ask for fewer, --memorized=PREFIX:TOKENS")
    chosen_B = np.sort(np.random.default_rng(seed).choice(ends[-1], min(count, ends[-1]), replace=False))
    document_B = np.searchsorted(ends, chosen_B, side="right")
    starts_B = split.document_starts[document_B] + chosen_B - (ends - places)[document_B]
    return split.take(starts_B, np.full(len(starts_B), length)).reshape(-1, length)


def _prompt(tokenizer: Tokenizer, number: int, prefix: list[int], rest: list[int]) -> Prompt:
    before, after = (tokenizer.decode_bytes(ids).decode("utf-8", errors="replace") for ids in (prefix, rest))
    return Prompt(number, Item(before, (after,)), before, "")
