"""What a tokenizer makes of texts: bytes per token, what it does not know, and how much of its vocabulary they use."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import DataError

_LONGEST = 10
_TITLES = (*(f"{name:>15}" for name in ("documents", "bytes", "tokens")), "bytes/token", "characters/token",
           *(f"{name:>10}" for name in ("unknown", "refused", "inexact")))  # fmt: skip


@dataclasses.dataclass
class Usage:
    """Of some texts. Tokens are those of the texts, without endoftext."""

    counts: np.ndarray
    """int64 per token of the vocabulary: how often it occurs."""
    documents: int = 0
    text_bytes: int = 0
    """In UTF-8, of the texts that were encoded."""
    characters: int = 0
    unknown: int = 0
    """Tokens that stand for what the tokenizer does not know."""
    refused: int = 0
    """Documents that it cannot represent and has no symbol for."""
    inexact: int = 0
    """Documents that decode to another text."""

    @property
    def tokens(self) -> int:
        """All of them."""
        return int(self.counts.sum())


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Usage:
    """Encode the texts, one at a time, and decode them again."""
    usage = Usage(np.zeros(tokenizer.vocab_size, np.int64))
    tokenizer.replaces_unknown = tokenizer.unknown_id is not None
    for text in texts:
        usage.documents += 1
        try:
            ids = tokenizer.encode(text)
        except DataError:
            usage.refused += 1
            continue
        usage.counts += np.bincount(np.array(ids, np.int64), minlength=tokenizer.vocab_size)
        usage.text_bytes += len(text.encode("utf-8"))
        usage.characters += len(text)
        usage.unknown += ids.count(tokenizer.unknown_id) if tokenizer.unknown_id is not None else 0
        usage.inexact += tokenizer.decode(ids) != text
    return usage


def lines(tokenizer: Tokenizer, usages: Mapping[str, Usage]) -> list[str]:
    """A table of the texts by name, and what is to be said of the vocabulary."""
    width = max(map(len, usages))
    rows = ["  ".join([" " * width, *_TITLES])]
    for name, one in usages.items():
        tokens = max(1, one.tokens)
        counts = (one.documents, one.text_bytes, one.tokens)
        rates = (one.text_bytes / tokens, one.characters / tokens)
        cells = [f"{count:,}" for count in counts] + [f"{rate:.3f}" for rate in rates]
        cells += [f"{count:,}" for count in (one.unknown, one.refused, one.inexact)]
        padded = (f"{cell:>{len(title)}}" for cell, title in zip(cells, _TITLES, strict=True))
        rows.append("  ".join([f"{name:<{width}}", *padded]))
    used = np.sum([one.counts for one in usages.values()], axis=0) > 0
    spelled = {
        index: tokenizer.decode_bytes([index]).decode("utf-8", "replace") for index in map(int, np.flatnonzero(used))
    }
    longest = sorted(spelled.values(), key=lambda piece: (-len(piece), piece))[:_LONGEST]
    return [
        *rows,
        f"vocabulary: {tokenizer.vocab_size:,} tokens, {used.sum():,} of them used ({used.mean():.1%})",
        f"longest of these: {', '.join(map(repr, longest))}",
    ]
