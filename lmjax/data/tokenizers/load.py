"""Tokenizers by kind: loaded from a directory or a file, or trained on texts."""

import json
import os
from collections.abc import Iterable
from typing import Any

from etils import epath

from lmjax.data.config import TokenizerConfig
from lmjax.data.tokenizers.alphabets import ByteTokenizer, CharacterTokenizer
from lmjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from lmjax.data.tokenizers.pieces import SentencePieceTokenizer, train_sentencepiece
from lmjax.data.tokenizers.tokenizer import DESCRIPTION, FILES, FORMAT, NO_TEXT, USE, Tokenizer, content_hash
from lmjax.data.tokenizers.wordpiece import train_wordpiece
from lmjax.errors import DataError, one_line
from lmjax.record import files, formats


def load_tokenizer(path: str | os.PathLike[str], endoftext: str | None = None) -> Tokenizer:
    """The tokenizer saved in a directory, or of a SentencePiece .model or a Hugging Face tokenizer.json file.

    `endoftext` names the symbol that ends a document in a foreign file; by default the customary ones are looked for.
    Raises DataError if it is missing, damaged, or has no such symbol.
    """
    located = files.locate(path)
    if located.is_dir() and not (located / DESCRIPTION).exists():
        candidates = [located / name for name in ("tokenizer.model", "tokenizer.json") if (located / name).exists()]
        if not candidates:
            inside = located / "tokenizer"
            hint = f"; did you mean {inside}?" if inside.is_dir() else ""
            raise DataError(f"no tokenizer in {located}: neither tokenizer.model nor tokenizer.json{hint}")
        located = candidates[0]
    if not located.is_dir():
        if not located.exists():
            raise DataError(f"tokenizer {located} does not exist; check tokenizer.path")
        kind = "huggingface" if located.suffix == ".json" else "sentencepiece"
        return _build(kind, files.read_bytes(located), endoftext, str(located))
    description, content, use = _read_saved(located)
    tokenizer = _build(description["kind"], content, description["endoftext"], str(located))
    if tokenizer.description() != description:
        raise DataError(f"tokenizer in {located} is not what its {DESCRIPTION} says; restore it or prepare again")
    tokenizer.begin_id, tokenizer.stop_ids = use
    return tokenizer


def saved_hash(directory: str | os.PathLike[str]) -> str:
    """`Tokenizer.hash` of a saved tokenizer without building it. Raises DataError if its files are damaged."""
    description, content, _ = _read_saved(files.locate(directory))
    return content_hash(description, content)


def train_tokenizer(cfg: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that the config asks for; those that are trained, and chars, learn from `texts`, all of them.

    The same texts in the same order give the same tokenizer, bit by bit. Raises DataError if the texts cannot give a
    vocabulary of the size asked for.
    """
    if cfg.kind == "bytes":
        return ByteTokenizer()
    if cfg.kind == "chars":
        return CharacterTokenizer(_characters(texts))
    if cfg.kind == "file":
        assert cfg.path is not None
        return load_tokenizer(cfg.path, cfg.endoftext)
    return train_wordpiece(cfg, texts) if cfg.kind == "wordpiece" else train_sentencepiece(cfg, texts)


def _characters(texts: Iterable[str]) -> set[str]:
    alphabet: set[str] = set()
    for text in texts:
        alphabet.update(text)
    if not alphabet:
        raise DataError(NO_TEXT)
    return alphabet


def _build(kind: str, content: bytes, endoftext: str | None, name: str) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer()
    try:
        if kind == "chars":
            return CharacterTokenizer.from_content(content, name)
        if kind == "sentencepiece":
            return SentencePieceTokenizer(content, endoftext, name)
        return HuggingFaceTokenizer(content, endoftext, name)
    except DataError:
        raise
    except Exception as error:  # of a library, in the middle of a file that it took for a sound one
        raise DataError(
            f"{name} is no sound {kind} tokenizer: {type(error).__name__}: {one_line(error, 200)}"
        ) from error


def _read_saved(directory: epath.Path) -> tuple[dict[str, Any], bytes, tuple[int | None, tuple[int, ...]]]:
    """The description, the content, and (begin_id, stop_ids), on which no token depends and hence not the hash."""
    path = directory / DESCRIPTION
    try:
        description = formats.unstamped(json.loads(files.read_bytes(path)), path, FORMAT, DataError)
        file, _ = FILES[description["kind"]], str(description["endoftext"])
        stored = description.pop(USE, {"begin_id": None, "stop_ids": []})
        begin, stops = stored["begin_id"], tuple(stored["stop_ids"])
        if not all(isinstance(index, int) for index in (*stops, *([] if begin is None else [begin]))):
            raise TypeError("ids are integers")
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error!r}; restore it or prepare the data set again") from error
    return description, files.read_bytes(directory / file) if file else b"", (begin, stops)
