"""A text's tokens word by word, each word encoded once: texts repeat their words, and looking one up is faster."""

import itertools
import re
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

    def __init__(
        self, encode: Callable[[list[str]], list[list[int]]], pieces: np.ndarray, dtype: np.typing.DTypeLike
    ) -> None:
        """`encode` gives the ids of each of some texts, `pieces[id]` is the UTF-8 of an id, `dtype` holds the ids."""
        self._encode, self._pieces, self._dtype = encode, pieces, np.dtype(dtype)
        self._lengths = np.array([*map(len, pieces)])
        self._known: dict[str, bytes] = {}
        self._held = 0

    def encode(self, text: str) -> np.ndarray | None:
        """The tokens of a text; None if they do not spell it, as those of a model that rewrites characters."""
        words, known = _WORD.findall(text), self._known
        if self._held > _ROOM:
            known.clear()
            self._held = 0
        new = [word for word in words if word not in known]
        if new and not self._learn([*dict.fromkeys(new)]):
            return None
        return np.frombuffer(b"".join(map(known.__getitem__, words)), self._dtype)

    def _learn(self, words: Sequence[str]) -> bool:
        """Keep these words, if their tokens spell each of them."""
        listed = self._encode(list(words))
        tokens = np.fromiter(itertools.chain.from_iterable(listed), self._dtype)
        ends = np.cumsum([*map(len, listed)])
        utf8 = [word.encode("utf-8") for word in words]
        apart = np.cumsum(self._lengths[tokens])[ends - 1] == np.cumsum([*map(len, utf8)])
        if not apart.all() or b"".join(self._pieces[tokens].tolist()) != b"".join(utf8):
            return False
        data, size, start = tokens.tobytes(), self._dtype.itemsize, 0
        for word, end in zip(words, (size * ends).tolist(), strict=True):
            self._known[word] = data[start:end]
            start = end
        # About what a place in a dict, a str and a bytes take.
        self._held += 150 * len(words) + 4 * sum(map(len, words)) + len(data)
        return True
