"""Words and runs of them are told apart, and are the same numbers everywhere."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmjax.data.curate.hashing import hash_runs, hash_text, hash_words, words


def test_words_are_those_of_every_script() -> None:
    assert words("Don't STOP—now_1, naïve!") == ["don", "t", "stop", "now_1", "naïve"]
    assert words("می\u200cروم به خانه.") == ["می", "روم", "به", "خانه"]
    assert words("東京tower、ひらがな") == ["東", "京", "tower", "ひ", "ら", "が", "な"]


def reference(values: list[int]) -> int:
    """A polynomial modulo 2^64, and MurmurHash3's finalizer, in Python's own integers."""
    total = 0
    for value in values:
        total = (total * 0x9E3779B97F4A7C15 + value) % 2**64
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        total = (total ^ (total >> 33)) * multiplier % 2**64
    return total ^ (total >> 33)


def test_hashes_are_the_same_everywhere() -> None:
    """They lie on disk between one process and the next."""
    assert hash_text("a word") == 0x9AB46B082522112B
    spelled = ["one", "two", "three"]
    values = [int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") for word in spelled]
    assert hash_words(spelled).tolist() == values
    assert hash_runs(hash_words(spelled), 2).tolist() == [reference(values[:2]), reference(values[1:])]


@given(spelled=st.lists(st.sampled_from("abc"), max_size=12), n=st.integers(1, 5))
def test_runs_have_equal_hashes_where_they_are_equal(spelled: list[str], n: int) -> None:
    hashes = hash_runs(hash_words(spelled), n)
    runs = [tuple(spelled[place : place + n]) for place in range(len(spelled) - n + 1)]
    assert len(hashes) == len(runs) and hashes.dtype == np.uint64
    for run, value in zip(runs, hashes, strict=True):
        assert [other == run for other in runs] == (hashes == value).tolist()
