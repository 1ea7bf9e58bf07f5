"""How questions are asked, and how answers become numbers: a form is a class with two methods.

The numbers of an item are pairs (y, weight), so that a benchmark's number is the sum of y over the sum of weights:
see statistics.py.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from lmjax.evaluate.requests import (
    Likelihood,
    Request,
    Scorer,
    check,
    continuations,
    log_likelihoods,
    read,
    request,
    rolling,
    room,
    windows,
)
from lmjax.evaluate.statistics import Estimate
from lmjax.evaluate.tasks.prompt import Prompt
from lmjax.generate.config import GenerateConfig


class Answer(NamedTuple):
    """What a model made of one item."""

    scores: Mapping[str, tuple[float, float]]
    """By metric, (y, weight). Those with weight 1 and y of 0 or 1 are right or wrong."""
    record: Mapping[str, Any]
    """What it said, as JSON."""
    unread: int = 0
    """Most tokens that one of its requests lost to the model's length."""


class Together(NamedTuple):
    """What only all answers together tell."""

    numbers: Mapping[str, Estimate] = MappingProxyType({})
    """By metric: those that are no ratios of sums over items."""
    notes: Sequence[str] = ()
    """What was counted, a line each: without it such numbers do not compare."""


class Form(Protocol):
    def check(self, scorer: Scorer, prompts: Sequence[Prompt]) -> None:
        """Raise what `answers` would, before there are weights."""

    def answers(self, scorer: Scorer, prompts: Sequence[Prompt]) -> list[Answer]:
        """In the order of the prompts. Raises what requests.py does."""

    def together(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Together:
        """What is no mean over items."""
        return Together()


@dataclasses.dataclass(frozen=True)
class MultipleChoice(Form):
    """Which of its choices does the model find the most probable? Of equally probable ones it has chosen the first.

    acc         by log p(choice | context)
    acc_token   by that over the choice's tokens
    acc_byte    by that over the choice's bytes (the harness's acc_norm, which counts characters, where texts are ASCII)
    acc_uncond  by that less log p(choice | `unconditional`): Brown et al. 2020, arXiv:2005.14165, section 2.4
    gold_bpb    -log2 p(right choice | context) over its bytes: smooth where accuracies are at chance
    """

    unconditional: str | None = None
    """A context that says nothing of the question, as "Answer:"."""

    def check(self, scorer: Scorer, prompts: Sequence[Prompt]) -> None:
        check(scorer, requests_of(scorer, self._pairs(prompts)))

    def answers(self, scorer: Scorer, prompts: Sequence[Prompt]) -> list[Answer]:
        found = by_text(scorer, self._pairs(prompts))

        def answer(prompt: Prompt) -> Answer:
            given = [found[prompt.context, text] for text in prompt.continuations]
            logp = np.array([one.logprob for one in given])
            by = {
                "acc": logp,
                "acc_token": logp / [one.tokens for one in given],
                "acc_byte": logp / [len(choice.encode()) for choice in prompt.item.choices],
            }
            if self.unconditional is not None:
                by["acc_uncond"] = logp - [found[self.unconditional, text].logprob for text in prompt.continuations]
            gold = prompt.item.gold
            scores = {name: (float(np.argmax(values) == gold), 1.0) for name, values in by.items()}
            scores["gold_bpb"] = _bits_per_byte(given[gold])
            record = {"logprobs": logp.tolist(), "chosen": {name: int(np.argmax(x)) for name, x in by.items()}}
            return Answer(scores, record | {"tokens": [one.tokens for one in given], "gold": gold}, unread(given))

        return [answer(prompt) for prompt in prompts]

    def _pairs(self, prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
        pairs = [(prompt.context, text) for prompt in prompts for text in prompt.continuations]
        return pairs + ([] if self.unconditional is None else [(self.unconditional, text) for _, text in pairs])


@dataclasses.dataclass(frozen=True)
class Cloze(Form):
    """Would the model write the answer?

    acc  each token of the answer is the most probable one
    nll  -log p(answer | context), nats per answer; perplexity is its exponential
    bpb  the same in bits per byte of the answer
    """

    def check(self, scorer: Scorer, prompts: Sequence[Prompt]) -> None:
        check(scorer, requests_of(scorer, self._pairs(prompts)))

    def answers(self, scorer: Scorer, prompts: Sequence[Prompt]) -> list[Answer]:
        pairs = self._pairs(prompts)
        found = by_text(scorer, pairs)

        def answer(one: Likelihood) -> Answer:
            scores = {"acc": (float(one.greedy), 1.0), "nll": (-one.logprob, 1.0), "bpb": _bits_per_byte(one)}
            return Answer(scores, {"logprob": one.logprob, "greedy": one.greedy, "tokens": one.tokens}, one.unread)

        return [answer(found[pair]) for pair in pairs]

    def _pairs(self, prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
        return [(prompt.context, prompt.delimiter + prompt.answer) for prompt in prompts]


@dataclasses.dataclass(frozen=True)
class Rolling(Form):
    """How probable are whole texts?

    nll  -log p(text), nats per token; perplexity is its exponential
    bpb  the same in bits per byte of text
    """

    share: float = 0.5
    """The stride of windows over a long text, as a share of what the model reads at once."""

    def check(self, scorer: Scorer, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            check(scorer, windows(scorer.tokenizer, prompt.context, context=scorer.context, stride=scorer.context))

    def answers(self, scorer: Scorer, prompts: Sequence[Prompt]) -> list[Answer]:
        stride = max(1, round(self.share * scorer.context))
        found = rolling(scorer, [prompt.context for prompt in prompts], stride=stride)

        def answer(one: Likelihood) -> Answer:
            scores = {"nll": (-one.logprob, float(one.tokens)), "bpb": _bits_per_byte(one)}
            return Answer(scores, {"logprob": one.logprob, "tokens": one.tokens, "bytes": one.bytes, "stride": stride})

        return [answer(one) for one in found]


@dataclasses.dataclass(frozen=True)
class Generation(Form):
    """Does the model write the answer?

    exact_match  the share of its continuations that are the answer, but for white space around it
    majority     the most frequent of several continuations is the answer: Wang et al. 2022, arXiv:2203.11171; of
                 equally frequent ones the first that was written counts
    """

    tokens: int
    stop: tuple[str, ...]
    """Strings that end a continuation."""
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0

    @property
    def cfg(self) -> GenerateConfig:
        return GenerateConfig(tokens=self.tokens, temperature=self.temperature, seed=self.seed)

    def check(self, scorer: Scorer, prompts: Sequence[Prompt]) -> None:
        room(scorer, self.cfg)
        for prompt in prompts:
            read(scorer.tokenizer, prompt.context)

    def answers(self, scorer: Scorer, prompts: Sequence[Prompt]) -> list[Answer]:
        asked = [prompt.context for prompt in prompts for _ in range(self.samples)]
        numbers = [prompt.number * self.samples + draw for prompt in prompts for draw in range(self.samples)]
        written = iter(continuations(scorer, asked, self.cfg, stop=self.stop, numbers=numbers))

        def answer(prompt: Prompt) -> Answer:
            texts = [next(written) for _ in range(self.samples)]
            said, wanted = [text.strip() for text in texts], prompt.answer.strip()
            scores = {"exact_match": (said.count(wanted) / self.samples, 1.0)}
            if self.samples > 1:
                ((most, _),) = collections.Counter(said).most_common(1)
                scores["majority"] = (float(most == wanted), 1.0)
            return Answer(scores, {"texts": texts, "answer": wanted})

        return [answer(prompt) for prompt in prompts]


def by_text(scorer: Scorer, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Likelihood]:
    """The likelihood of each continuation after its context; what is asked twice is scored once."""
    different = list(dict.fromkeys(pairs))
    return dict(zip(different, log_likelihoods(scorer, requests_of(scorer, different)), strict=True))


def requests_of(scorer: Scorer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    return [request(scorer.tokenizer, *pair) for pair in pairs]


def _bits_per_byte(one: Likelihood) -> tuple[float, float]:
    return -one.logprob / math.log(2), float(one.bytes)


def unread(found: Sequence[Likelihood]) -> int:
    """Most tokens that one of them lost."""
    return max(one.unread for one in found)
