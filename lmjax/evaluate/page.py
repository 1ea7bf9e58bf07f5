"""`--page=evaluation.html`: what a model answers, for people: numbers with their errors, and examples, right and wrong.

Examples are those with the lowest hashes of all that there are of a kind: not chosen, and the same for every model.
"""

import collections
import hashlib
from collections.abc import Iterator, Mapping, Sequence

from lmjax.evaluate.tasks.forms import Answer
from lmjax.evaluate.tasks.prompt import Prompt
from lmjax.evaluate.tasks.results import ALL, Result
from lmjax.evaluate.tasks.table import head, number, rows
from lmjax.record.page import Bar, escape, html_page, table

_EXAMPLES = 5  # of each kind
_LONGEST = 1200  # characters of a question that are shown, its last ones


def page(title: str, results: Mapping[str, Result], against: Mapping[str, Result] | None) -> str:
    """The page. `against` are the answers that `results` are compared with, by the same names."""
    parts = [f'<p class="quiet">{escape(title)}. Intervals are 95% intervals, with items as the sampled units.</p>']
    for name, result in results.items():
        other = None if against is None else against[name]
        parts += [f"<h2>{escape(name)}</h2>", *_about(result), *_numbers(result, other), *_categories(result)]
        parts += _examples(result, other)
    return html_page("Evaluation", parts)


def _about(result: Result) -> Iterator[str]:
    facts = [f"{len(result.answers):,} items, digest {result.digest}", *_baselines(result.prompts)]
    if result.unread:
        facts.append(f"{result.unread:,} of them are longer than what the model reads, and lost their beginnings")
    yield f'<p class="quiet">{escape("; ".join(facts))}.</p>'


def _baselines(prompts: Sequence[Prompt]) -> Iterator[str]:
    """What accuracy is without knowledge: of a guess, and of always the same place among the choices."""
    choices = [len(prompt.item.choices) for prompt in prompts]
    if min(choices, default=0) < 2 or len({prompt.item.gold for prompt in prompts}) < 2:
        return
    yield f"a guess is right in {sum(1 / n for n in choices) / len(choices):.4f}"
    ((place, times),) = collections.Counter(prompt.item.gold for prompt in prompts).most_common(1)
    yield f"always choice {place + 1} in {times / len(prompts):.4f}"


def _numbers(result: Result, other: Result | None) -> Iterator[str]:
    yield from table(head(other is not None), list(rows(result, other)))
    for note in result.together.notes:
        yield f'<div class="name">{escape(note)}</div>'


def _categories(result: Result) -> Iterator[str]:
    """Of the first metric, the lowest first."""
    metric, by = next(iter(result.numbers().items()))
    if len(by) == 1:
        return
    some = sorted((pair for pair in by.items() if pair[0] != ALL), key=lambda pair: pair[1].value)
    lines = [
        (name, f"{one.items:,}", number(one.value), number(one.stderr), Bar(one.value) if 0 <= one.value <= 1 else "")
        for name, one in some
    ]
    yield f"<details><summary>{escape(metric)} by category</summary>"
    yield from table(("category", "items", metric, "+-", ""), lines)
    yield "</details>"


# Examples ---------------------------------------------------------------------------------------------------------


def _examples(result: Result, other: Result | None) -> Iterator[str]:
    """Of each kind, by the first metric: right and wrong, here and there; or of one kind where it is neither."""
    metric = result.metrics[0]
    kinds: dict[str, list[int]] = {}
    for place in sorted(range(len(result.prompts)), key=lambda place: _rank(result.prompts[place])):
        kinds.setdefault(_kind(result, other, metric, place), []).append(place)
    for kind, places in sorted(kinds.items()):
        yield f"<details><summary>{escape(kind)}: {len(places):,} of {len(result.prompts):,}</summary>"
        for place in places[:_EXAMPLES]:
            yield from _example(result, other, place)
        yield "</details>"


def _rank(prompt: Prompt) -> bytes:
    return hashlib.blake2b(f"{prompt.context}\0{prompt.item.choices}".encode()).digest()


def _kind(result: Result, other: Result | None, metric: str, place: int) -> str:
    def judged(of: Result) -> str:
        value, weight = of.answers[place].scores.get(metric, (0.0, 0.0))
        return {1.0: metric, 0.0: f"not {metric}"}.get(value, "") if weight == 1 else ""

    here = judged(result)
    if not here:
        return "examples"
    return here if other is None else f"{here}, the other {judged(other)}"


def _example(result: Result, other: Result | None, place: int) -> Iterator[str]:
    prompt, answers = result.prompts[place], [of.answers[place] for of in (result, other) if of is not None]
    about = [f"item {prompt.number}", prompt.item.category, *(_worth(answers[0], metric) for metric in result.metrics)]
    yield f'<div class="name">{escape(", ".join(filter(None, about)))}</div>'
    if prompt.context:
        yield _text(prompt.context[-_LONGEST:])
    record = answers[0].record
    if "logprobs" in record:
        yield from _choices(prompt, answers)
    for answer in answers:
        for text in answer.record.get("texts", [answer.record["text"]] if "text" in answer.record else []):
            yield _text(f"▸ {text}")
    if "logprobs" not in record and (wanted := prompt.item.references or prompt.item.choices[:1]):
        yield f'<div class="name">{escape("people wrote: " + " | ".join(wanted))}</div>'


def _choices(prompt: Prompt, answers: Sequence[Answer]) -> Iterator[str]:
    """With log-probabilities; the likeliest to the first model is chosen."""
    logprobs = [answer.record["logprobs"] for answer in answers]
    gold = answers[0].record.get("gold")
    lines = [
        [choice, *(f"{of[place]:.2f}" for of in logprobs),
         ", ".join(filter(None, ["right" if place == gold else "", "chosen" if of_first == max(logprobs[0]) else ""]))]
        for place, (choice, of_first) in enumerate(zip(prompt.item.choices, logprobs[0], strict=True))
    ]  # fmt: skip
    yield from table(("choice", *["log p", "other"][: len(answers)], ""), lines)


def _worth(answer: Answer, metric: str) -> str:
    if metric not in answer.scores or not answer.scores[metric][1]:
        return ""
    value, weight = answer.scores[metric]
    return f"{metric} {value / weight:.3g}"


def _text(text: str) -> str:
    return f'<pre dir="auto">{escape(text)}</pre>'
