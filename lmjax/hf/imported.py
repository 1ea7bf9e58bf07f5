"""A model from elsewhere, and the directory of Hugging Face files that it is read from and written to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import CheckpointError
from lmjax.hf.config_json import Family, read_config, read_json, write_config
from lmjax.hf.families import family_for, family_of
from lmjax.hf.params import read_params, write_params
from lmjax.hf.tokenizer_files import read_tokenizer, tokenizer_files
from lmjax.models.config import ModelConfig
from lmjax.weights import Params

CONFIG = "config.json"
SHARD_BYTES = 5_000_000_000


class Imported(NamedTuple):
    """All that a work directory needs of a model."""

    model: ModelConfig
    params: Params
    """float32, on the first device."""
    tokenizer: Tokenizer | None
    files: Mapping[str, bytes]
    """What lies beside the tokenizer: special tokens, chat template, generation defaults."""


def read_checkpoint(directory: Path) -> Imported:
    """A Hugging Face checkpoint. Runs none of its code.

    Raises ConfigError for a config.json that is not wholly understood, CheckpointError for tensors that are not the
    ones it describes, DataError for a tokenizer that cannot be used.
    """
    cfg, family = read_model(directory)
    tokenizer, files = read_tokenizer(directory, cfg)
    return Imported(cfg, read_params(directory, family, cfg), tokenizer, files)


def read_model(directory: Path) -> tuple[ModelConfig, Family]:
    """The model that a checkpoint's config.json describes, and its family. Raises ConfigError as above."""
    values = read_json(directory / CONFIG)
    family = family_of(values, str(directory / CONFIG))
    return read_config(values, family, str(directory / CONFIG)), family


def write_checkpoint(
    directory: Path, imported: Imported, *, dtype: str = "float32", shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write what transformers reads; the names of the files. config.json comes last.

    Raises ConfigError for a model that no family computes, CheckpointError for a directory that is not empty or cannot
    be written.
    """
    family = family_for(imported.model)
    values = write_config(imported.model, family, dtype)
    _require_empty(directory)
    beside: dict[str, bytes] = {}
    if imported.tokenizer is not None:
        beside = tokenizer_files(imported.tokenizer, imported.files, imported.model.context)
        first, *others = imported.tokenizer.stop_ids or (imported.tokenizer.endoftext_id,)
        values |= {"bos_token_id": imported.tokenizer.begin_id, "eos_token_id": [first, *others] if others else first}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files = write_params(directory, imported.params, family, imported.model, dtype=dtype, shard_bytes=shard_bytes)
        for name, content in beside.items():
            (directory / name).write_bytes(content)
        (directory / CONFIG).write_text(json.dumps(values, indent=2))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written ({error.strerror or error}); choose another") from None
    return [*files, *beside, CONFIG]


def _require_empty(directory: Path) -> None:
    """Nothing is written over or mixed with other files: half of an export, without its config.json, neither."""
    if (directory / CONFIG).exists():
        raise CheckpointError(f"{directory} holds a checkpoint already; choose another --out")
    if directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} holds other files; choose a new or empty --out")
