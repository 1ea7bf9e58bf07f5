"""How a checkpoint's model uses its tokenizer: what it reads before every text, and what ends one."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.data.chat.templates import special_tokens
from lmjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from lmjax.data.tokenizers.pieces import SentencePieceTokenizer
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import DataError
from lmjax.hf.config_json import read_json

logger = logging.getLogger(__name__)

# Where transformers looks for the ids that end a text, in this order.
_GENERATION = ("generation_config.json", "config.json")


def begin_id(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> int | None:
    """The id that transformers puts before every text, for the settings of a tokenizer_config.json.

    A tokenizer.json says it by itself, in its post-processor, whatever `add_bos_token` is; for a tokenizer.model
    `add_bos_token` says it, and left out it means yes, as it is documented and as the models were trained.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.opening_id
    assert isinstance(tokenizer, SentencePieceTokenizer)
    symbols = [special_tokens(settings).get("bos_token"), "<s>", "<bos>"] if settings.get("add_bos_token", True) else []
    known = [tokenizer.symbol_id(symbol) for symbol in symbols if symbol is not None]
    return next((index for index in known if index is not None), None)


def stop_ids(directory: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """`eos_token_id`, one or several, of generation_config.json or else config.json; empty if neither says.

    Ids that the tokenizer does not have, such as the default of a family in a small model, are left out with a warning.
    Raises DataError for what is no id.
    """
    for path in (directory / name for name in _GENERATION if (directory / name).exists()):
        found = read_json(path).get("eos_token_id")
        if found is None:
            continue
        ids = tuple(found) if isinstance(found, list) else (found,)
        if not all(type(index) is int for index in ids):
            raise DataError(f"{path}: eos_token_id={str(found)[:80]!r} is no token id, nor a list of them")
        known = tuple(index for index in ids if 0 <= index < tokenizer.vocab_size)
        if known != ids:
            logger.warning("%s: eos_token_id=%s is not among the tokenizer's %d ids", path, found, tokenizer.vocab_size)
        return known
    return ()
