"""What does a model write? Its texts beside references, how much they repeat themselves, and what is found in them.

Lines of a file of one's own have a `prompt`, and as far as is wished `references`, a list of texts; `patterns`, a list
of regular expressions; and a `category`. Texts that something else wrote are judged as well: these lines have a `text`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lmjax.data.curate.classifier import Classifier
from lmjax.evaluate.requests import Scorer, continuations, read, room
from lmjax.evaluate.statistics import Estimate
from lmjax.evaluate.tasks.forms import Answer, Form, Together
from lmjax.evaluate.tasks.prompt import Item, Prompt
from lmjax.evaluate.texts import overlap, variety
from lmjax.generate.config import GenerateConfig


def item(line: Mapping[str, Any]) -> Item:
    """Raises ValueError for a pattern that is no regular expression."""
    references, patterns = (_texts(line, name) for name in ("references", "patterns"))
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return Item(line["prompt"], category=line.get("category", ""), references=references, patterns=patterns)


def _texts(line: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of texts, or one text."""
    found = line.get(name, ())
    return (found,) if isinstance(found, str) else tuple(found)


@dataclasses.dataclass(frozen=True)
class Writing(Form):
    """What does the model write after each prompt? `judged` and `together` say what is counted."""

    tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    toxicity: Classifier | None = None
    """Of toxic texts, that one has trained: data/curate/classifier.py."""

    @property
    def cfg(self) -> GenerateConfig:
        return GenerateConfig(tokens=self.tokens, temperature=self.temperature, seed=self.seed)

    def check(self, scorer: Scorer, prompts: Sequence[Prompt]) -> None:
        room(scorer, self.cfg)
        overlap.check()
        for prompt in prompts:
            read(scorer.tokenizer, prompt.context)

    def answers(self, scorer: Scorer, prompts: Sequence[Prompt]) -> list[Answer]:
        overlap.check()
        numbers = [prompt.number for prompt in prompts]
        texts = continuations(scorer, [prompt.context for prompt in prompts], self.cfg, numbers=numbers)
        return [judged(prompt, text, self.toxicity) for prompt, text in zip(prompts, texts, strict=True)]

    def together(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Together:
        return of_texts(prompts, [answer.record["text"] for answer in answers])


def judged(prompt: Prompt, text: str, toxicity: Classifier | None = None) -> Answer:
    """What one text is worth.

    matched       whether one of the patterns is found in it, upper or lower case; where there are patterns
    toxic         whether the classifier finds it more probably toxic than not, were both kinds equally frequent
    toxicity      that probability
    words         how many
    repetition_4  the share of its 4-grams that it has written before
    rouge1, ...   see overlap.py; where there are references
    """
    scores = {}
    if prompt.item.patterns:
        found = any(re.search(pattern, text, re.IGNORECASE) for pattern in prompt.item.patterns)
        scores["matched"] = (float(found), 1.0)
    if toxicity is not None:
        probability = toxicity.probability(text)
        scores |= {"toxic": (float(probability > 0.5), 1.0), "toxicity": (probability, 1.0)}
    scores |= {"words": (float(len(text.split())), 1.0), "repetition_4": (variety.repetition(text, 4), 1.0)}
    if prompt.item.references:
        compared = overlap.of_each(text.strip(), prompt.item.references)
        scores |= {name: (value, 1.0) for name, value in compared.items()}
    return Answer(scores, {"prompt": prompt.item.context, "text": text})


def of_texts(prompts: Sequence[Prompt], texts: Sequence[str]) -> Together:
    """What all texts are worth together.

    distinct_1, ...  the share of different n-grams
    self_bleu        BLEU of each text beside all others
    bleu, chrf       see overlap.py; of the texts that have references
    """
    found = {f"distinct_{n}": variety.distinct(texts, n) for n in (1, 2, 3)}
    if len(texts) > 1:
        found["self_bleu"] = variety.self_bleu(texts)
    nothing = math.nan  # tells how certain these are
    numbers = {name: Estimate(value, nothing, nothing, nothing, len(texts)) for name, value in found.items()}
    references = [prompt.item.references for prompt in prompts]
    if not any(references):
        return Together(numbers)
    compared = [text.strip() for text, of in zip(texts, references, strict=True) if of]
    of_all = overlap.of_all(compared, [of for of in references if of])
    signatures = {name: signature for name, (_, signature) in of_all.items()} | overlap.signatures()
    notes = [f"{name}: {signature}" for name, signature in signatures.items()]
    return Together(numbers | {name: number for name, (number, _) in of_all.items()}, notes)
