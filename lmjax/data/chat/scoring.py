"""Which tokens of a conversation a model is trained on to write.

Where a template marks what the assistant wrote, those marks say it. Of a template without marks it is the difference of
two renderings: with the response, and without it but ready for it, as `lmjax generate --chat` reads a prompt.

    <|im_start|>user  Hi<|im_end|>  <|im_start|>assistant   Hello.  <|im_end|>
                                    header                  start   body      end

That holds where each rendering begins with the one before. A template that writes earlier turns in other words once
there are later ones is refused: nothing else tells what of it the assistant wrote.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.chat.conversation import Conversation, read_conversation
from lmjax.data.chat.rendering import Renderer
from lmjax.data.config import ChatConfig
from lmjax.data.store.shards import ONE
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import DataError

Range = tuple[int, int]
"""From a character on, up to another."""


class Passage(NamedTuple):
    """A range of characters that is scored."""

    start: int
    end: int
    weight: int = ONE
    """In hundredths."""


class Written(NamedTuple):
    """A conversation as text."""

    text: str
    scored: list[Passage]
    """Ascending, and none within another."""


class Scored(NamedTuple):
    """A conversation as tokens."""

    tokens: list[int]
    """Closed by endoftext: the template's own, or one that is added."""
    weights: np.ndarray
    """uint8, how much each counts as one that the model is trained on to write, in hundredths; that of the first, which
    nothing precedes, is 0."""
    n_bytes: int
    """What the scored tokens spell in UTF-8."""
    truncated: bool


def encode_conversation(line: str, tokenizer: Tokenizer, renderer: Renderer, cfg: ChatConfig) -> Scored:
    """The tokens of a conversation in JSON.

    Raises DataError, in words that follow its place, for what is no conversation, for a template that fails or does not
    tell what the assistant wrote, and for a conversation that is too long.
    """
    return tokenize(write(read_conversation(line), renderer, cfg), tokenizer, cfg)


# Text -----------------------------------------------------------------------------------------------------------------


def write(conversation: Conversation, renderer: Renderer, cfg: ChatConfig) -> Written:
    """The text of a conversation, and what of it is scored. Raises DataError."""

    def render(messages: list[Any], **variables: Any) -> Any:
        return renderer.render(messages, tools=conversation.tools, **variables)

    whole = render(conversation.messages)
    try:
        whole.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"unpaired surrogate U+{ord(whole.text[error.start]):04X}: not a text; repair it") from None
    if cfg.score == "all":
        return Written(whole.text, [Passage(0, len(whole.text))])
    responses = conversation.responses[-1:] if cfg.score == "last" else conversation.responses
    weights = {number: round(ONE * conversation.messages[number].get("weight", 1)) for number in responses}
    chosen = {number for number in responses if weights[number]}
    if whole.marked is None:
        ranges = [(number, _by_difference(conversation, number, whole.text, render)) for number in chosen]
    else:
        ranges = list(_by_marks(conversation, chosen, [(start, end) for start, end in whole.marked], renderer))
    scored = [
        Passage(*_parts(conversation, number, span, whole.text, render, cfg), weights[number])
        for number, span in sorted(ranges)
    ]
    if not any(one.end > one.start for one in scored):
        raise DataError("no response in it is scored: weights and template leave out all of it")
    return Written(whole.text, _apart(scored))


def _by_marks(
    conversation: Conversation, chosen: set[int], marked: list[Range], renderer: Renderer
) -> Iterator[tuple[int, Range]]:
    """(the number of a response, what the template marks of it)."""
    responses = conversation.responses
    if len(marked) != len(responses):
        raise DataError(
            f"the chat template in {renderer.template.where} marks {len(marked)} passages as written by the assistant, "
            f"who has {len(responses)} messages; mend its {{% generation %}}, or score all"
        )
    yield from ((number, span) for number, span in zip(responses, marked, strict=True) if number in chosen)


def _by_difference(conversation: Conversation, number: int, whole: str, render: Callable[..., Any]) -> Range:
    """What of the whole text a response is, its end mark included."""
    messages = conversation.messages
    opened = render(messages[:number], add_generation_prompt=True).text
    closed = render(messages[: number + 1]).text
    if not (whole.startswith(closed) and closed.startswith(opened) and len(opened) < len(closed)):
        raise DataError(
            f"message {number + 1}: the chat template does not write it as it announces it, or writes it in other "
            "words as more follow, so that nothing tells what of the text the assistant wrote; mark that in the "
            "template by {% generation %}, or score the last response alone, or all"
        )
    if opened == render(messages[:number]).text and _content_end(messages[number], closed, len(opened)) is None:
        raise DataError(
            f"message {number + 1}: the chat template has no add_generation_prompt that would tell the response from "
            "what announces it; mark it in the template by {% generation %}"
        )
    return len(opened), len(closed)


def _parts(
    conversation: Conversation, number: int, span: Range, whole: str, render: Callable[..., Any], cfg: ChatConfig
) -> Range:
    """What is scored of a response that has the range `span`: with its header, if asked for, or without its end."""
    start, end = span
    if not cfg.ends:
        found = _content_end(conversation.messages[number], whole[:end], start)
        if found is None:
            raise DataError(
                f"message {number + 1} does not stand in the text as it is, so its end is not known; use ends"
            )
        end = found
    if cfg.headers:
        before = render(conversation.messages[:number]).text
        if not whole[:start].startswith(before):
            raise DataError(
                f"message {number + 1}: the chat template writes what is before it in other words as more follow: "
                "nothing tells what announces it; leave out headers"
            )
        start = len(before)
    return start, end


def _content_end(message: dict[str, Any], text: str, start: int) -> int | None:
    """Where the content of a message, which `text` begins with from `start` on but for white space, ends; None where
    that is not so."""
    content = (message.get("content") or "").strip()
    found = text.find(content, start) if content else -1
    return found + len(content) if found >= 0 and not text[start:found].strip() else None


def _apart(passages: list[Passage]) -> list[Passage]:
    """The passages without what is empty; what two of them hold is of the first."""
    apart: list[Passage] = []
    reached = 0
    for one in passages:
        if one.end > (start := max(one.start, reached)):
            apart.append(one._replace(start=start))
            reached = one.end
    return apart


# Tokens ---------------------------------------------------------------------------------------------------------------


def tokenize(written: Written, tokenizer: Tokenizer, cfg: ChatConfig) -> Scored:
    """The tokens of a text; one is scored if it begins in what is scored. Raises DataError."""
    text, passages = written
    tokens, starts = tokenizer.place_symbols(text)
    if tokenizer.unknown_id in tokens and tokenizer.unknown_id != tokenizer.endoftext_id:
        raise DataError("it has characters that are unknown to the tokenizer; use one with byte fallback")
    edges = np.array([edge for one in passages for edge in (one.start, one.end)])
    inside = np.searchsorted(edges, starts, side="right")  # odd in a passage, even behind it
    of_passage = np.array([0, *(weight for one in passages for weight in (one.weight, 0))], np.uint8)
    weights = of_passage[inside]
    if tokens[-1:] != [tokenizer.endoftext_id]:
        closes = passages[-1].end == len(text) and (cfg.ends or cfg.score == "all")
        tokens, weights = [*tokens, tokenizer.endoftext_id], np.append(weights, np.uint8(closes * passages[-1].weight))
    length = len(tokens)
    if truncated := cfg.longest is not None and length > cfg.longest:
        tokens, weights = _truncated(tokens, weights, cfg.longest, cfg)
    weights[:1] = 0
    if not weights.any():
        raise DataError(
            f"none of its {length:,} tokens is scored"
            + (f" once it is cut at its {cfg.too_long} to chat.longest={cfg.longest:,}; raise that" * truncated)
        )
    n_bytes = len(tokenizer.decode_bytes(np.array(tokens)[weights > 0].tolist()))
    return Scored(tokens, weights, n_bytes, truncated)


def _truncated(tokens: list[int], weights: np.ndarray, longest: int, cfg: ChatConfig) -> tuple[list[int], np.ndarray]:
    """The last `longest` tokens, or as many of the first with the endoftext that closes them, which is not scored then.

    Raises DataError where neither is asked for.
    """
    if cfg.too_long == "left":
        return tokens[-longest:], weights[-longest:]
    if cfg.too_long == "right":
        return [*tokens[: longest - 1], tokens[-1]], np.append(weights[: longest - 1], np.uint8(0))
    before = int(np.argmax(weights > 0))
    raise DataError(
        f"{len(tokens):,} tokens, {before:,} of them before what is scored, more than chat.longest={longest:,}; raise "
        "it, shorten the conversation, or set chat.too_long (lmjax prepare: --too-long) to left or right"
    )
