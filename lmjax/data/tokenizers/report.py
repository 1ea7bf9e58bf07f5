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

    def add(self, tokenizer: Tokenizer, text: str) -> None:
        """Encode a text, decode it again, and count what that was."""
        self.documents += 1
        try:
            ids = tokenizer.encode(text)
        except DataError:
            self.refused += 1
            return
        self.counts += np.bincount(np.array(ids, np.int64), minlength=tokenizer.vocab_size)
        self.text_bytes += len(text.encode("utf-8"))
        self.characters += len(text)
        self.unknown += ids.count(tokenizer.unknown_id) if tokenizer.unknown_id is not None else 0
        self.inexact += tokenizer.decode(ids) != text


def measure(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]) -> dict[str, Usage]:
    """What becomes of (group, text), one at a time, by group; and last of all, where there are several."""
    tokenizer.replaces_unknown = tokenizer.unknown_id is not None
    usages: dict[str, Usage] = {}
    for group, text in texts:
        if group not in usages:
            usages[group] = Usage(np.zeros(tokenizer.vocab_size, np.int64))
        usages[group].add(tokenizer, text)
    if len(usages) < 2:
        return usages
    parts, total = [dataclasses.asdict(usage) for usage in usages.values()], "all"
    while total in usages:
        total = f"({total})"
    return usages | {total: Usage(**{name: sum(part[name] for part in parts) for name in parts[0]})}


def lines(tokenizer: Tokenizer, usages: Mapping[str, Usage]) -> list[str]:
    """A table of what `measure` found, and what is to be said of the vocabulary."""
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
    used = [*usages.values()][-1].counts > 0
    spelled = {
        index: tokenizer.decode_bytes([index]).decode("utf-8", "replace") for index in map(int, np.flatnonzero(used))
    }
    longest = sorted(spelled.values(), key=lambda piece: (-len(piece.strip()), piece))[:_LONGEST]
    return [
        *rows,
        f"vocabulary: {tokenizer.vocab_size:,} tokens, {used.sum():,} of them used ({used.mean():.1%})",
        f"longest of these: {', '.join(map(repr, longest))}",
    ]
