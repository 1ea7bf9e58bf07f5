"""Text from prompts, all of it or in pieces for a terminal.

Programs are few (rows.py): a set for each model, number of rows, length of memory and setting. Texts are independent:
each is the same alone and beside any others.
"""

import codecs
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.devices.place import use_mesh
from lmjax.errors import ConfigError
from lmjax.generate.beam import beam_search
from lmjax.generate.config import GenerateConfig
from lmjax.generate.forward import functions
from lmjax.generate.rows import MOST_STEPS
from lmjax.generate.spread import Ready, auto_mesh, decoding_weights
from lmjax.generate.writer import Writer, check, stop_array
from lmjax.models.front import places
from lmjax.models.model import Model
from lmjax.process import group
from lmjax.weights import Params


@dataclasses.dataclass(frozen=True)
class Generation:
    """What follows one prompt."""

    text: str
    ids: list[int]
    """New tokens, without the one that ended the text."""
    finished: bool
    """The model ended the text; otherwise `tokens` ran out."""


def ready(model: Model, params: Params, cfg: GenerateConfig) -> Ready:
    """The weights laid out for decoding, in the bits of `cfg.weights`: many calls of the functions below share them,
    which else lay them out each for itself. Raises ConfigError for a model that cannot multiply in fewer bits."""
    return Ready(decoding_weights(model, params, auto_mesh(), cfg.weights))


def generate(
    model: Model,
    params: Params | Ready,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    cfg: GenerateConfig,
) -> list[Generation]:
    """Continue every prompt: a text, or ids that are read as they are (a conversation, from data/chat/).

    A text is read after the tokenizer's `begin_id`, if it has one; an empty text starts a document. A row ends with one
    of the tokenizer's `stop_ids`, or endoftext where it has none. Under `jax.set_mesh` rows are spread over the
    devices (spread.py), and every process has all texts. Raises ConfigError when a prompt and its new tokens are longer
    than the model's table of positions.
    """
    stops = stop_tokens(tokenizer)
    texts = generate_ids(
        model,
        params,
        [_read(prompt, tokenizer) for prompt in prompts],
        cfg,
        endoftext=tokenizer.endoftext_id,
        vocab=tokenizer.vocab_size,
        stops=stops,
    )

    def generation(prompt: str | Sequence[int], ids: list[int]) -> Generation:
        kept = before_stop(ids, stops if cfg.stop_at_endoftext else ())
        spelled = tokenizer.decode_bytes(kept)
        if _opens(prompt):
            spelled = spelled.removeprefix(tokenizer.prefix)
        return Generation(spelled.decode("utf-8", errors="replace"), kept, finished=len(kept) < len(ids))

    return [generation(prompt, ids) for prompt, ids in zip(prompts, texts, strict=True)]


def generate_ids(
    model: Model,
    params: Params | Ready,
    prompts: Sequence[Sequence[int]],
    cfg: GenerateConfig,
    *,
    endoftext: int,
    vocab: int,
    stops: Sequence[int] = (),
) -> list[list[int]]:
    """Up to `cfg.tokens` new ids for every prompt; those after the first of `stops` (default: endoftext) mean nothing
    if the config stops there."""
    if not prompts:
        return []
    if cfg.beams > 1:
        return _best_ids(model, params, prompts, cfg, vocab, endoftext, stops or (endoftext,))
    writer = Writer(model, params, prompts, cfg, endoftext=endoftext, vocab=vocab, stops=stops)
    texts: list[list[int]] = [[] for _ in prompts]
    while writer.is_writing:
        for text, ids in writer.write(MOST_STEPS):
            texts[text] += ids
    return texts


def _best_ids(
    model: Model,
    params: Params | Ready,
    prompts: Sequence[Sequence[int]],
    cfg: GenerateConfig,
    vocab: int,
    endoftext: int,
    stops: Sequence[int],
) -> list[list[int]]:
    """By beam search, in one program for all prompts."""
    check(model.spec, prompts, cfg.tokens, front=places(params))
    mesh = auto_mesh()
    weights = decoding_weights(model, params, mesh, cfg.weights)
    with use_mesh(mesh):
        found = beam_search(
            functions(model, vocab),
            weights,
            *_pad(prompts, endoftext),
            stop_array(stops, cfg),
            cfg=dataclasses.replace(cfg, seed=0, stop_at_endoftext=True),  # which are no part of the program
        )
        return np.asarray(group.wait_on_cpu(found[0])).tolist()


def stream(
    model: Model,
    params: Params | Ready,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    cfg: GenerateConfig,
    *,
    chunk: int = 8,
) -> Iterator[str]:
    """The text of `generate(..., [prompt], cfg)` in pieces: after the first token, then every `chunk` tokens.

    Raises ConfigError as `generate`, and for beam search, whose text is known only at the end.
    """
    assert 0 < chunk <= MOST_STEPS, chunk
    if cfg.beams > 1:
        raise ConfigError(f"beam search (beams={cfg.beams}) cannot stream; set beams=1")
    stops = stop_tokens(tokenizer)
    ids = _read(prompt, tokenizer)
    writer = Writer(
        model, params, [ids], cfg, endoftext=tokenizer.endoftext_id, vocab=tokenizer.vocab_size, stops=stops
    )
    chunks = _chunks(writer, chunk, stops if cfg.stop_at_endoftext else ())
    return _spell(chunks, tokenizer, tokenizer.prefix if _opens(prompt) else b"")


def _chunks(writer: Writer, chunk: int, stops: Sequence[int]) -> Iterator[list[int]]:
    """The ids of one text: the first alone, then so many at a time."""
    steps = 0
    while writer.is_writing:
        ((_, ids),) = writer.write(steps)
        yield before_stop(ids, stops)
        steps = chunk


def _spell(chunks: Iterable[list[int]], tokenizer: Tokenizer, prefix: bytes) -> Iterator[str]:
    """The text of the ids, piece by piece, without `prefix` in front."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
    for ids in chunks:
        if spelled := tokenizer.decode_bytes(ids):
            spelled, prefix = spelled.removeprefix(prefix), b""
        if piece := utf8.decode(spelled):
            yield piece
    if rest := utf8.decode(b"", final=True):
        yield rest


# On the host ------------------------------------------------------------------------------------------------------


def _read(prompt: str | Sequence[int], tokenizer: Tokenizer) -> Sequence[int]:
    """The ids that the model reads before it writes."""
    if not isinstance(prompt, str):
        return prompt
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    return begin + tokenizer.encode(prompt)


def _opens(prompt: str | Sequence[int]) -> bool:
    """What follows is a text of its own, not the rest of one: decoding takes away what encoding puts in front."""
    return not isinstance(prompt, str) or not prompt


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's own, else endoftext."""
    return tokenizer.stop_ids or (tokenizer.endoftext_id,)


def before_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """The ids before the first of `stops`."""
    return list(itertools.takewhile(lambda index: index not in stops, ids))


def _pad(prompts: Sequence[Sequence[int]], endoftext: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts padded at their ends to one of a few lengths, and their lengths; an empty one becomes endoftext."""
    rows = [list(prompt) or [endoftext] for prompt in prompts]
    lengths_B = np.array([len(row) for row in rows], np.int32)
    tokens_BT = np.zeros((len(rows), _bucket(int(lengths_B.max()))), np.int32)
    for row, ids in zip(tokens_BT, rows, strict=True):
        row[: len(ids)] = ids
    return tokens_BT, lengths_B


def _bucket(length: int) -> int:
    """The next power of two up to 64, the next multiple of 64 beyond."""
    return max(8, 1 << (length - 1).bit_length()) if length <= 64 else -(-length // 64) * 64
