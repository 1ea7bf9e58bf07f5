"""A conversation as it was prepared, to look at before anything is trained on it: which of its tokens are scored."""

import itertools
from collections.abc import Iterator

import numpy as np

from lmjax.data.store.shards import TokenSplit
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import visible

_COLOUR, _PLAIN = "\x1b[1;32m", "\x1b[0m"


def shown(split: TokenSplit, tokenizer: Tokenizer, document: int = 0, *, colour: bool) -> str:
    """The text of a document, what is scored in colour, or between the marks >> and << where there is none.

    Control characters are spelled out, symbols written by their names.
    """
    before, after = (_COLOUR, _PLAIN) if colour else (">>", "<<")
    return "".join(
        f"{before}{visible(text)}{after}" if scored else visible(text)
        for text, scored in passages(split, tokenizer, document)
    )


def passages(split: TokenSplit, tokenizer: Tokenizer, document: int) -> Iterator[tuple[str, bool]]:
    """A document's text in pieces that are scored, or not, as a whole."""
    start, end = split.document_starts[document : document + 2]
    where = np.array([start]), np.array([end - start])
    ids, names = split.take(*where).tolist(), {index: symbol for symbol, index in tokenizer.symbol_ids.items()}
    scored_T = split.weights(*where) > 0
    for scored, tokens in itertools.groupby(zip(scored_T.tolist(), ids, strict=True), lambda one: one[0]):
        spelled = [names[index].encode() if index in names else tokenizer.decode_bytes([index]) for _, index in tokens]
        yield b"".join(spelled).decode("utf-8", errors="replace"), scored
