"""Text to token ids and back: the protocol, and how a tokenizer is saved.

Three promises hold for every tokenizer here.
- A token that stands for "unknown" is not emitted unless `replaces_unknown` asks for it: encoding raises a DataError
  that names the character.
- endoftext is the loader's mark between documents. Text that merely spells it is encoded as ordinary text, and decoding
  renders it as nothing, so `decode(encode(x)) == x` for every text that a lossless tokenizer is given.
- The same content has the same `hash`, which data sets and checkpoints carry.
"""

import functools
import itertools
import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lmjax.data.tokenizers.sections import sections
from lmjax.errors import DataError
from lmjax.record import files, formats

ENDOFTEXT = "<|endoftext|>"
NAME_ENDOFTEXT = "name its end of text in tokenizer.endoftext (prepare --endoftext=SYMBOL)"
NO_TEXT = "no text to train the tokenizer on: the documents are empty"
FORMAT = 1
DESCRIPTION = "tokenizer.description.json"
USE = "use"  # how a model uses the tokenizer: part of the description's file, not of the hash
FILES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json", "chars": "alphabet.json", "bytes": None}


class Tokenizer(Protocol):
    """What training, generation and `prepare` need of a tokenizer. Implementations subclass it."""

    kind: str
    """sentencepiece, huggingface, chars or bytes: how it is stored."""
    vocab_size: int
    """Every id is below it."""
    endoftext_id: int
    """The id that follows every document."""
    endoftext: str
    """The symbol of that id."""
    prefix: bytes = b""
    """What encoding puts in front of every text and decoding takes away again: the space of many SentencePiece models.
    `decode_bytes`, which may start anywhere in a text, leaves it."""
    unknown_id: int | None = None
    """The id of the symbol for what the tokenizer cannot represent, if it has one."""
    replaces_unknown: bool = False
    """Whether encoding puts that symbol there instead of refusing the text."""
    begin_id: int | None = None
    """What a model trained elsewhere reads before every text. Ours read endoftext, and only where a text is empty."""
    stop_ids: tuple[int, ...] = ()
    """What ends a text that such a model writes; where there is none, endoftext does."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without endoftext. Raises DataError for a character that it cannot represent."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            character = f"U+{ord(text[error.start]):04X}"
            raise DataError(f"unpaired surrogate {character} at character {error.start}: not a text") from error
        return list(itertools.chain.from_iterable(self.encode_parts(text)))

    def encode_parts(self, text: str) -> Iterator[list[int]]:
        """`encode` of a valid text piece by piece, each for consecutive parts of it, so that memory stays small."""
        return map(self._encode, self._parts(text))

    def tokens(self, text: str, dtype: np.typing.DTypeLike) -> tuple[np.ndarray, bool]:
        """`encode` of a valid text, endoftext behind it, as an array; and whether the ids decode to the text."""
        parts, utf8, exact, at = [], text.encode("utf-8"), True, 0
        for ids in self.encode_parts(text):
            parts.append(np.fromiter(ids, dtype, len(ids)))  # numpy refuses an id that the type cannot hold
            spelled = self.decode(parts[-1]).encode("utf-8")
            exact = exact and utf8.startswith(spelled, at)
            at += len(spelled)
        return self._closed(parts, dtype), exact and at == len(utf8)

    def _closed(self, parts: Sequence[np.ndarray], dtype: np.typing.DTypeLike) -> np.ndarray:
        return np.concatenate([*parts, np.array([self.endoftext_id], dtype)], dtype=dtype, casting="safe")

    def _parts(self, text: str) -> Iterable[str]:
        """`text` cut in places where its encoding may be cut too."""
        return sections(text)

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of one part."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The UTF-8 that the ids spell; a character may be cut at either end, so a stream joins before it decodes."""

    @abstractmethod
    def content(self) -> bytes:
        """The tokenizer's file."""

    def encode_symbols(self, text: str) -> list[int]:
        """`encode`, but where the text spells a symbol of the tokenizer, such as <|im_end|>, it is that symbol.

        For text that a template wrote: whoever may put text into one can write symbols, too.
        """
        return self.place_symbols(text)[0]

    def place_symbols(self, text: str) -> tuple[list[int], list[int]]:
        """`encode_symbols(text)`, and where in the text each of these tokens begins, counted in characters.

        A token that holds only a part of a character begins where the character does.
        """
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for part in self._symbols.split(text):
            if part in self.symbol_ids:
                ids.append(self.symbol_ids[part])
                starts.append(at)
            elif part:
                found, begins = self._place(part, opens=not ids)
                ids += found
                starts += [at + begin for begin in begins]
            at += len(part)
        return ids, starts

    def _place(self, part: str, *, opens: bool) -> tuple[list[int], list[int]]:
        """The ids of a part without symbols, and where each begins in it; `opens` where it stands before all others."""
        ids = self.encode(part)
        ends = itertools.accumulate(len(self.decode_bytes([index])) for index in ids)
        return ids, characters_at(part, [0, *ends][:-1])

    @property
    def symbol_ids(self) -> Mapping[str, int]:
        """What `encode_symbols` reads as symbols, with their ids."""
        return {self.endoftext: self.endoftext_id}

    @functools.cached_property
    def _symbols(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, self.symbol_ids)) + ")")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def hash(self) -> str:
        """`content_hash` of this tokenizer."""
        return content_hash(self.description(), self.content())

    def description(self) -> dict[str, Any]:
        """What is saved beside the file, and hashed with it."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "endoftext_id": self.endoftext_id,
            "endoftext": self.endoftext,
        }

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer so that `load_tokenizer(directory)` is its equal; the description comes last."""
        target = files.locate(directory)
        with files.reporting(target, "write"):
            target.mkdir(parents=True, exist_ok=True)
        if name := FILES[self.kind]:
            files.write_bytes(target / name, self.content())
        use = {"begin_id": self.begin_id, "stop_ids": self.stop_ids}
        foreign = {USE: use} if any(value not in (None, ()) for value in use.values()) else {}
        described = self.description() | foreign | formats.stamp(FORMAT)
        files.write_bytes(target / DESCRIPTION, json.dumps(described, indent=2).encode())


def content_hash(description: dict[str, Any], content: bytes) -> str:
    """BLAKE2b of all that fixes what a tokenizer does."""
    return files.hash_bytes(json.dumps(description, sort_keys=True).encode(), b"\n", content)


def bytes_table(entries: Sequence[bytes]) -> np.ndarray:
    """What `bytes_of` reads: an array of objects, which numpy gathers faster than Python does."""
    return np.array(entries, object)


def bytes_of(ids: Sequence[int] | np.ndarray, table: np.ndarray) -> bytes:
    """The table's entries for the ids, joined. Raises DataError for an id outside the vocabulary."""
    try:
        return b"".join(table[np.asarray(ids, np.int64)].tolist())
    except IndexError:
        raise DataError(f"token id {max(ids)} is outside the tokenizer's vocabulary of {len(table)}") from None


def characters_at(text: str, byte_offsets: Sequence[int]) -> list[int]:
    """Which character of the text each of these bytes of its UTF-8 belongs to; all of them lie in it."""
    if text.isascii():
        return list(byte_offsets)
    character_of_byte = [index for index, character in enumerate(text) for _ in character.encode("utf-8")]
    return [character_of_byte[offset] for offset in byte_offsets]
