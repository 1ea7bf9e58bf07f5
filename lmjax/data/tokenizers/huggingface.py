"""Hugging Face tokenizer.json files."""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lmjax.data.tokenizers.tokenizer import ENDOFTEXT, NAME_ENDOFTEXT, Tokenizer, bytes_of, bytes_table
from lmjax.errors import DataError

_CUSTOMARY_ENDS = (ENDOFTEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, run by the tokenizers library, exact on its ids.

    No template, padding or truncation is applied, and special tokens are never read out of text.
    """

    kind = "huggingface"

    def __init__(self, content: bytes, endoftext: str | None = None, name: str = "tokenizer.json"):
        self._content = content
        self._tokenizer, self._json = _parse(content, name)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.endoftext = self._end_symbol(endoftext, name)
        self.endoftext_id = self._tokenizer.token_to_id(self.endoftext)
        # Not get_vocab_size: ids may have gaps, and every id must be below it.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._is_byte_level = '"ByteLevel"' in json.dumps(self._json.get("decoder"))
        self._may_cut = self._is_byte_level and '"add_prefix_space": true' not in json.dumps(self._json)
        model = self._json.get("model", {})
        self._inside = model.get("continuing_subword_prefix") if model.get("type") == "WordPiece" else None
        unknown = model.get("unk_token")
        if unknown is None and isinstance(model.get("unk_id"), int):  # a Unigram model names the id
            unknown = model["vocab"][model["unk_id"]][0]
        self.unknown_id = None if unknown is None else self._tokenizer.token_to_id(unknown)
        probe = self._tokenizer.encode("a", add_special_tokens=False).ids
        spelled = b"".join(self._spell(self._tokenizer.id_to_token(index)) for index in probe)
        self.prefix = b" " if spelled == b" " + self._tokenizer.decode(probe).encode("utf-8") else b""

    @property
    def opening_id(self) -> int | None:
        """What the file's own template puts in front of a text, if it puts anything there."""
        plain, opened = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        return None if opened[0] == plain[0] else opened[0]

    def _end_symbol(self, wanted: str | None, name: str) -> str:
        candidates = _CUSTOMARY_ENDS if wanted is None else (wanted,)
        for symbol in candidates:
            if self._tokenizer.token_to_id(symbol) is not None:
                return symbol
        raise DataError(f"{name} has no symbol {' or '.join(candidates)}; {NAME_ENDOFTEXT}")

    def content(self) -> bytes:
        return self._content

    def _parts(self, text: str) -> Iterable[str]:
        return super()._parts(text) if self._may_cut else [text]

    def _encode(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if self.unknown_id is not None and self.unknown_id in encoding.ids and not self.replaces_unknown:
            start, end = encoding.offsets[encoding.ids.index(self.unknown_id)]
            raise DataError(f"{text[start:end][:20]!r} is unknown to the tokenizer; use one with byte fallback")
        return encoding.ids

    def place_symbols(self, text: str) -> tuple[list[int], list[int]]:
        self._tokenizer.encode_special_tokens = False
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        # The library may leave the space of ` word` out of its range: the token begins where the one before it ends.
        ends = [0, *(end for _, end in encoding.offsets)]
        return encoding.ids, [min(start, end) for (start, _), end in zip(encoding.offsets, ends, strict=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = [int(index) for index in ids if index != self.endoftext_id]
        return self._tokenizer.decode(known, skip_special_tokens=False)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return bytes_of(ids, self._bytes)

    def _spell(self, token: str) -> bytes:
        if self._inside is None:
            return _spell_byte_level(token) if self._is_byte_level else _spell_pieces(token)
        piece = token.removeprefix(self._inside)
        if self._is_byte_level:
            return _spell_byte_level(piece)
        return (piece if piece != token else f" {token}").encode()  # BERT's decoder puts blanks between words

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        added = {token["id"]: token["content"].encode("utf-8") for token in self._json.get("added_tokens", [])}
        table = [b""] * self.vocab_size
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            table[index] = added[index] if index in added else self._spell(token)
        table[self.endoftext_id] = b""
        return bytes_table(table)


def _parse(content: bytes, name: str) -> tuple[Any, dict[str, Any]]:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(f"{name}: tokenizer.json files need an extra, install lmjax[data]") from error
    try:
        return tokenizers.Tokenizer.from_str(content.decode("utf-8")), json.loads(content)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{name} is not a Hugging Face tokenizer: {str(error).splitlines()[0]}") from error


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def _spell_byte_level(token: str) -> bytes:
    table = byte_of_character()
    if not table.keys() >= set(token):  # no spelling of bytes: the library takes it as it is
        return token.encode("utf-8")
    return bytes(table[character] for character in token)


def _spell_pieces(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[1:-1], 16)])
    return token.replace("\u2581", " ").encode("utf-8")
