"""The tokenizer files of a Hugging Face directory."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from lmjax.data.chat.templates import FILE, SETTINGS, special_tokens
from lmjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from lmjax.data.tokenizers.load import load_tokenizer
from lmjax.data.tokenizers.pieces import SentencePieceTokenizer
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import ConfigError, DataError
from lmjax.hf import symbols
from lmjax.hf.config_json import read_json
from lmjax.hf.tokenizer_json import as_json, from_merges
from lmjax.models.config import ModelConfig
from lmjax.record.files import reporting

logger = logging.getLogger(__name__)

# Kept as they are: who they are for (chat templates, other programs) reads them.
_SYMBOLS = "special_tokens_map.json"
KEPT = (SETTINGS, _SYMBOLS, FILE, "generation_config.json")
_LARGEST_KEPT = 16 << 20


def read_tokenizer(directory: Path, cfg: ModelConfig) -> tuple[Tokenizer | None, dict[str, bytes]]:
    """The tokenizer of a checkpoint, or None if it brings none, and the files beside it.

    Read from tokenizer.json, else tokenizer.model, else GPT-2's pair of vocab.json and merges.txt. Its endoftext is the
    `eos_token` of tokenizer_config.json or special_tokens_map.json; without one the customary symbols are looked for.
    Raises DataError for a tokenizer that is damaged, names code to run, or ends texts with a symbol that the model has
    no row for.
    """
    files = {name: _small(directory / name) for name in KEPT if (directory / name).exists()}
    settings = _settings(directory, files)
    tokenizer = _load(directory, settings)
    if tokenizer is None:
        return None, files
    if tokenizer.endoftext_id >= (cfg.vocab or 0):
        raise DataError(
            f"{directory}: {tokenizer.endoftext!r} is token {tokenizer.endoftext_id}, and the model has "
            f"{cfg.vocab} rows; the tokenizer is another model's"
        )
    if tokenizer.vocab_size > (cfg.vocab or 0):
        logger.warning(
            "%s: the tokenizer has %d ids and the model %d rows; the rest cannot be read or written",
            directory,
            tokenizer.vocab_size,
            cfg.vocab,
        )
    tokenizer.begin_id = symbols.begin_id(tokenizer, settings)
    tokenizer.stop_ids = symbols.stop_ids(directory, tokenizer)
    return tokenizer, files


def kept_files(directory: epath.Path) -> dict[str, bytes]:
    """The files beside a tokenizer that a work directory has kept."""
    return {name: (directory / name).read_bytes() for name in KEPT if (directory / name).exists()}


def _load(directory: Path, settings: Mapping[str, Any]) -> Tokenizer | None:
    end = special_tokens(settings).get("eos_token")
    for path in (directory / "tokenizer.json", directory / "tokenizer.model"):
        if path.exists():
            return load_tokenizer(path, end)
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    if not (vocab.exists() and merges.exists()):
        return None
    content = from_merges(_small(vocab), _small(merges), settings, str(directory))
    return HuggingFaceTokenizer(content, end, str(vocab))


def _settings(directory: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """tokenizer_config.json; symbols that it leaves out are those of the older special_tokens_map.json."""
    settings: dict[str, Any] = {}
    for name in (_SYMBOLS, SETTINGS):
        try:
            settings |= read_json(directory / name) if name in files else {}
        except ConfigError as error:
            raise DataError(str(error)) from None
    if settings.get("auto_map"):
        raise DataError(f"{directory / SETTINGS}: auto_map names code to run, and none is ever run; remove it")
    return settings


def _small(path: Path) -> bytes:
    with reporting(path):
        if path.stat().st_size > _LARGEST_KEPT:
            raise DataError(f"{path} has {path.stat().st_size} bytes, which no file of this name has; remove it")
        return path.read_bytes()


def tokenizer_files(tokenizer: Tokenizer, beside: Mapping[str, bytes], context: int) -> dict[str, bytes]:
    """What transformers reads for a tokenizer, by name; files `beside` it stay as they are."""
    foreign = tokenizer.begin_id is not None or SETTINGS in beside
    content = None if foreign and tokenizer.kind == "sentencepiece" else as_json(tokenizer)
    if content is None:
        file, settings = {"tokenizer.model": tokenizer.content()}, _sentencepiece_settings(tokenizer)
    else:
        file, settings = {"tokenizer.json": content}, {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"eos_token": tokenizer.endoftext, "model_max_length": context, "clean_up_tokenization_spaces": False}
    return {**file, SETTINGS: json.dumps(settings, indent=2).encode(), **beside}


def _sentencepiece_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """transformers' class that puts a space in front of a text, or the one that does not, and the begin symbol."""
    assert isinstance(tokenizer, SentencePieceTokenizer)
    begin = None if tokenizer.begin_id is None else tokenizer.symbol(tokenizer.begin_id)
    name = "LlamaTokenizer" if tokenizer.prefix else "GemmaTokenizer"
    return {"tokenizer_class": name, "bos_token": begin, "add_bos_token": begin is not None}
