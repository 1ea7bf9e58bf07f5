"""The same questions asked otherwise: is an answer still right after typing errors, in capitals, in other words?

Only the question itself changes; its examples and answers do not, but for other words, which are those of all. What is
drawn depends on the seed and the question alone.
"""

import random
from collections.abc import Callable, Sequence

from lmjax.evaluate.tasks.prompt import Prompt

_TYPOS = 0.05  # errors per letter: two or three in a line


def typos(text: str, rng: random.Random) -> str:
    """One letter in twenty is left out, written twice, or changes places with the next."""
    letters = list(text)
    for place, letter in enumerate(text):
        if not letter.isalpha() or rng.random() >= _TYPOS:
            continue
        error = rng.randrange(3)
        if error == 2 and place + 1 < len(letters) and letters[place + 1].isalpha():
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
        else:
            letters[place] = "" if error == 0 else letters[place] * 2
    return "".join(letters)


def lower(text: str, rng: random.Random) -> str:
    return text.lower()


def upper(text: str, rng: random.Random) -> str:
    return text.upper()


REWORDED = "reworded"
"""In the place of a perturbation: each of the other wordings that a benchmark has."""

PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {"typos": typos, "lower": lower, "upper": upper}


def perturbed(prompts: Sequence[Prompt], name: str, seed: int) -> list[Prompt]:
    """The prompts with their questions changed by one of PERTURBATIONS."""

    def change(prompt: Prompt) -> Prompt:
        question = prompt.item.context
        changed = PERTURBATIONS[name](question, random.Random(f"{seed} {name} {question}"))
        assert prompt.context.endswith(question)
        before = prompt.context[: len(prompt.context) - len(question)]
        return prompt._replace(context=before + changed, item=prompt.item._replace(context=changed))

    return [change(prompt) for prompt in prompts]
