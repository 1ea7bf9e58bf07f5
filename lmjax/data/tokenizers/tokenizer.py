"""Text to token ids and back: the protocol, and loading, saving and training by kind.

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
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from etils import epath

from lmjax.data.config import TokenizerConfig
from lmjax.data.tokenizers.sections import sections
from lmjax.errors import DataError
from lmjax.record import files

ENDOFTEXT = "<|endoftext|>"
NAME_ENDOFTEXT = "name its end of text in tokenizer.endoftext (prepare --endoftext=SYMBOL)"
NO_TEXT = "no text to train the tokenizer on: the documents are empty"
_DESCRIPTION = "tokenizer.description.json"
_USE = "use"  # how a model uses the tokenizer: part of the description's file, not of the hash
_FILES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json", "chars": "alphabet.json", "bytes": None}


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

    def _parts(self, text: str) -> Iterable[str]:
        """`text` cut in places where its encoding may be cut too."""
        return sections(text)

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of one part."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 that the ids spell; a character may be cut at either end, so a stream joins before it decodes."""

    @abstractmethod
    def content(self) -> bytes:
        """The tokenizer's file."""

    def encode_symbols(self, text: str) -> list[int]:
        """`encode`, but where the text spells a symbol of the tokenizer, such as <|im_end|>, it is that symbol.

        For text that a template wrote: whoever may put text into one can write symbols, too.
        """
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def hash(self) -> str:
        """BLAKE2b of all that fixes what the tokenizer does."""
        return _hash(self._description(), self.content())

    def _description(self) -> dict[str, Any]:
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
        if name := _FILES[self.kind]:
            files.write_atomically(target / name, self.content())
        use = {"begin_id": self.begin_id, "stop_ids": self.stop_ids}
        foreign = {_USE: use} if any(value not in (None, ()) for value in use.values()) else {}
        files.write_atomically(target / _DESCRIPTION, json.dumps(self._description() | foreign, indent=2).encode())


def load_tokenizer(path: str | os.PathLike[str], endoftext: str | None = None) -> Tokenizer:
    """The tokenizer saved in a directory, or of a SentencePiece .model or a Hugging Face tokenizer.json file.

    `endoftext` names the symbol that ends a document in a foreign file; by default the customary ones are looked for.
    Raises DataError if it is missing, damaged, or has no such symbol.
    """
    located = files.locate(path)
    if located.is_dir() and not (located / _DESCRIPTION).exists():
        candidates = [located / name for name in ("tokenizer.model", "tokenizer.json") if (located / name).exists()]
        if not candidates:
            raise DataError(f"no tokenizer in {located}: neither tokenizer.model nor tokenizer.json")
        located = candidates[0]
    if not located.is_dir():
        if not located.exists():
            raise DataError(f"tokenizer {located} does not exist; check tokenizer.path")
        kind = "huggingface" if located.suffix == ".json" else "sentencepiece"
        return _build(kind, files.read_bytes(located), endoftext, str(located))
    description, content, use = _read_saved(located)
    tokenizer = _build(description["kind"], content, description["endoftext"], str(located))
    if tokenizer._description() != description:
        raise DataError(f"tokenizer in {located} is not what its {_DESCRIPTION} says; restore it or prepare again")
    tokenizer.begin_id, tokenizer.stop_ids = use
    return tokenizer


def saved_hash(directory: str | os.PathLike[str]) -> str:
    """`Tokenizer.hash` of a saved tokenizer without building it. Raises DataError if its files are damaged."""
    description, content, _ = _read_saved(files.locate(directory))
    return _hash(description, content)


def train_tokenizer(cfg: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that the config asks for; bpe, unigram and chars learn from `texts`, all of them.

    The same texts in the same order give the same tokenizer, bit by bit. Raises DataError if the texts cannot give a
    vocabulary of the size asked for.
    """
    from lmjax.data.tokenizers import alphabets

    if cfg.kind == "bytes":
        return alphabets.ByteTokenizer()
    if cfg.kind == "chars":
        return alphabets.CharacterTokenizer(_characters(texts))
    if cfg.kind == "file":
        assert cfg.path is not None
        return load_tokenizer(cfg.path, cfg.endoftext)
    from lmjax.data.tokenizers.pieces import train_sentencepiece

    return train_sentencepiece(cfg, texts)


def bytes_of(ids: Sequence[int], table: Sequence[bytes]) -> bytes:
    """The table's entries for the ids, joined. Raises DataError for an id outside the vocabulary."""
    try:
        return b"".join([table[index] for index in ids])
    except IndexError:
        raise DataError(f"token id {max(ids)} is outside the tokenizer's vocabulary of {len(table)}") from None


def _characters(texts: Iterable[str]) -> set[str]:
    alphabet: set[str] = set()
    for text in texts:
        alphabet.update(text)
    if not alphabet:
        raise DataError(NO_TEXT)
    return alphabet


def _build(kind: str, content: bytes, endoftext: str | None, name: str) -> Tokenizer:
    if kind == "bytes":
        from lmjax.data.tokenizers.alphabets import ByteTokenizer

        return ByteTokenizer()
    if kind == "chars":
        from lmjax.data.tokenizers.alphabets import CharacterTokenizer

        return CharacterTokenizer.from_content(content, name)
    if kind == "sentencepiece":
        from lmjax.data.tokenizers.pieces import SentencePieceTokenizer

        return SentencePieceTokenizer(content, endoftext, name)
    from lmjax.data.tokenizers.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(content, endoftext, name)


def _read_saved(directory: epath.Path) -> tuple[dict[str, Any], bytes, tuple[int | None, tuple[int, ...]]]:
    """The description, the content, and (begin_id, stop_ids), on which no token depends and hence not the hash."""
    path = directory / _DESCRIPTION
    try:
        description = json.loads(files.read_bytes(path))
        file, _ = _FILES[description["kind"]], str(description["endoftext"])
        stored = description.pop(_USE, {"begin_id": None, "stop_ids": []})
        begin, stops = stored["begin_id"], tuple(stored["stop_ids"])
        if not all(isinstance(index, int) for index in (*stops, *([] if begin is None else [begin]))):
            raise TypeError("ids are integers")
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error!r}; restore it or prepare the data set again") from error
    return description, files.read_bytes(directory / file) if file else b"", (begin, stops)


def _hash(description: dict[str, Any], content: bytes) -> str:
    return files.hash_bytes(json.dumps(description, sort_keys=True).encode(), b"\n", content)
