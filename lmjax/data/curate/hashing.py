"""Words and runs of words as 64-bit numbers, the same on every machine."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

# Chinese and Japanese put no spaces between words.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_MOST_KNOWN = 1 << 20
_known: dict[str, int] = {}
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))  # of MurmurHash3's finalizer
_STEP = 0x9E3779B97F4A7C15


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case, and single characters of Chinese and Japanese: the text
    without punctuation and white space."""
    return WORD.findall(text.lower())


def hash_text(text: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def hash_words(spelled: list[str]) -> np.ndarray:
    """uint64 per word. Words that occur again and again are looked up."""
    if len(_known) > _MOST_KNOWN:
        _known.clear()
    hashes = np.empty(len(spelled), np.uint64)
    for place, word in enumerate(spelled):
        value = _known.get(word)
        if value is None:
            value = _known[word] = hash_text(word)
        hashes[place] = value
    return hashes


def hash_runs(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 per run of `n` consecutive words, none where there are fewer: polynomial in the hashes, then mixed."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    return hash_columns([hashes[place : place + count] for place in range(n)])


def hash_columns(columns: Sequence[np.ndarray]) -> np.ndarray:
    """uint64 per row of a table, given by its uint64 columns."""
    total = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        total = total * np.uint64(_STEP) + column
    for multiplier in _MIX:
        total = (total ^ (total >> np.uint64(33))) * multiplier
    return total ^ (total >> np.uint64(33))
