"""A text's tokens word by word, each word encoded once: texts repeat their words, and looking one up is faster."""

import re
from array import array
from collections.abc import Callable, Sequence

import numpy as np

# A word has its spaces in front. A newline or a tab is a word of its own.
_WORD = re.compile(r"[\n\t]| *[^ \n\t]+| +")
_CROSSING = re.compile(r"[^ ] |.[\n\t]|[\n\t].", re.DOTALL)
_ROOM = 1 << 26  # bytes, of the words that are kept


def crosses_words(piece: str) -> bool:
    """Whether a piece of a vocabulary could be taken from two words that stand side by side."""
    return _CROSSING.search(piece) is not None


class Words:
    """The words seen so far and what they were encoded to, for byte pairs none of whose pieces crosses words.

    What is merged within a word then does not depend on the words beside it. Of a unigram model, too, the best pieces
    of a text are those of its words; but it adds up in float32 from the beginning, so near ties may fall either way.
    """

    def __init__(self, encode: Callable[[str], list[int]], pieces: Sequence[bytes]) -> None:
        """`encode` gives the ids of a text, `pieces[id]` is the UTF-8 of an id."""
        self._encode, self._pieces = encode, pieces
        self._dtype = np.min_scalar_type(len(pieces) - 1)
        self._known: dict[str, bytes] = {}
        self._inexact: set[str] = set()
        self._held = 0

    def encode(self, text: str) -> tuple[np.ndarray, bool]:
        """The tokens of a text, and whether they spell it."""
        if self._held > _ROOM:
            self._known, self._held = {}, 0
        words, known = _WORD.findall(text), self._known
        for word in dict.fromkeys([word for word in words if word not in known]):
            known[word] = self._learned(word)
        tokens = np.frombuffer(b"".join(map(known.__getitem__, words)), self._dtype)
        return tokens, not self._inexact or self._inexact.isdisjoint(words)

    def _learned(self, word: str) -> bytes:
        """The tokens of a word, which is noted if they do not spell it."""
        ids, pieces = self._encode(word), self._pieces
        if b"".join([pieces[index] for index in ids]) != word.encode("utf-8"):
            self._inexact.add(word)
        tokens = array(self._dtype.char, ids).tobytes()
        self._held += 150 + 4 * len(word) + len(tokens)  # about what a place in a dict, a str and a bytes take
        return tokens
