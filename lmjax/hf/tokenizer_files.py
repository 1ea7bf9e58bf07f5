"""The tokenizer files of a Hugging Face directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.data import storage
from lmjax.data.tokenizer import Tokenizer, load_tokenizer
from lmjax.errors import ConfigError, DataError
from lmjax.hf import symbols
from lmjax.hf.config_json import read_json
from lmjax.hf.tokenizer_json import as_json
from lmjax.models.config import ModelConfig

# Read for the tokenizer itself, in this order: tokenizer.json is what a slow tokenizer was converted to.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
SETTINGS = "tokenizer_config.json"
# Kept as they are: who they are for (chat templates, other programs) reads them.
KEPT = (SETTINGS, "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
_LARGEST_KEPT = 16 << 20


def read_tokenizer(directory: Path, cfg: ModelConfig) -> tuple[Tokenizer | None, dict[str, bytes]]:
    """The tokenizer of a checkpoint, or None if it brings none, and the files beside it.

    Its endoftext is the `eos_token` of tokenizer_config.json; without one the customary symbols are looked for. Raises
    DataError for a tokenizer that is damaged, names code to run, or has more symbols than the model has rows.
    """
    files = {name: _small(directory / name) for name in KEPT if (directory / name).exists()}
    settings = _settings(directory) if SETTINGS in files else {}
    found = [directory / name for name in _TOKENIZERS if (directory / name).exists()]
    if not found:
        return None, files
    tokenizer = load_tokenizer(found[0], _symbol(settings.get("eos_token")))
    if tokenizer.endoftext_id >= (cfg.vocab or 0):
        raise DataError(
            f"{found[0]}: {tokenizer.endoftext!r} is token {tokenizer.endoftext_id}, and the model has "
            f"{cfg.vocab} rows; the tokenizer is another model's"
        )
    tokenizer.begin_id = symbols.begin_id(tokenizer, settings)
    tokenizer.stop_ids = symbols.stop_ids(directory, tokenizer)
    return tokenizer, files


def _settings(directory: Path) -> dict[str, Any]:
    try:
        settings = read_json(directory / SETTINGS)
    except ConfigError as error:
        raise DataError(str(error)) from None
    if settings.get("auto_map"):
        raise DataError(f"{directory / SETTINGS}: auto_map names code to run, and none is ever run; remove it")
    return settings


def _small(path: Path) -> bytes:
    with storage.reporting(path):
        if path.stat().st_size > _LARGEST_KEPT:
            raise DataError(f"{path} has {path.stat().st_size} bytes, which no file of this name has; remove it")
        return path.read_bytes()


def _symbol(token: Any) -> str | None:
    """A special token, written as a string or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def tokenizer_files(tokenizer: Tokenizer, beside: Mapping[str, bytes], context: int) -> dict[str, bytes]:
    """What transformers reads for a tokenizer, by name; files `beside` it stay as they are."""
    content = as_json(tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast" if content is not None else "LlamaTokenizer",
        "eos_token": tokenizer.endoftext,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    file = {"tokenizer.json": content} if content is not None else {"tokenizer.model": tokenizer.content()}
    return {**file, SETTINGS: json.dumps(settings, indent=2).encode(), **beside}
