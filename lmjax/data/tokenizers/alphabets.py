"""The tokenizers without merges: raw bytes, and the characters of a text."""

import json
from collections.abc import Iterable, Sequence

import numpy as np

from lmjax.data.tokenizers.tokenizer import ENDOFTEXT, Tokenizer, bytes_of, bytes_table
from lmjax.errors import DataError


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8: ids 0 to 255 are the bytes, 256 is endoftext."""

    kind = "bytes"
    vocab_size = 257
    endoftext_id = 256
    endoftext = ENDOFTEXT

    def __init__(self) -> None:
        self._bytes = bytes_table([*(bytes([byte]) for byte in range(256)), b""])

    def content(self) -> bytes:
        return b""

    def _encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return bytes_of(ids, self._bytes)


class CharacterTokenizer(Tokenizer):
    """One token per character of an alphabet, sorted by code point; endoftext has the id after the last."""

    kind = "chars"
    endoftext = ENDOFTEXT

    def __init__(self, alphabet: Iterable[str]):
        self._alphabet = "".join(sorted(set(alphabet)))
        self._ids = {character: index for index, character in enumerate(self._alphabet)}
        self._bytes = bytes_table([*(character.encode("utf-8") for character in self._alphabet), b""])
        self.endoftext_id = len(self._alphabet)
        self.vocab_size = len(self._alphabet) + 1

    @classmethod
    def from_content(cls, content: bytes, name: str) -> "CharacterTokenizer":
        """The inverse of `content`."""
        try:
            alphabet = json.loads(content)
            if not isinstance(alphabet, str) or not alphabet:
                raise ValueError("not a string of characters")
            return cls(alphabet)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} is not a character tokenizer: {error}; prepare the data set again") from error

    def content(self) -> bytes:
        return json.dumps(self._alphabet).encode()

    def _encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise DataError(
                f"character {error.args[0]!r} is not in the tokenizer's alphabet of {len(self._alphabet)}; "
                "use kind bpe, unigram or bytes, or train it on text that has the character"
            ) from error

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return bytes_of(ids, self._bytes)
