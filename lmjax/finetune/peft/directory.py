"""Adapters in the format of PEFT, both ways: a directory with adapter_config.json and adapter_model.safetensors.

A new kind is one file and a line in `FORMATS`.
"""

import json
import logging
from pathlib import Path

import numpy as np

from lmjax.errors import CheckpointError, ConfigError
from lmjax.finetune.peft import ia3, low_rank
from lmjax.finetune.peft.format import CONFIG, WEIGHTS, Adapter, Format, Saved
from lmjax.finetune.peft.modules import modules
from lmjax.hf.config_json import read_json
from lmjax.hf.families import family_for
from lmjax.hf.shards import list_file, read_tensors, write_file
from lmjax.models.config import ModelConfig

logger = logging.getLogger(__name__)

# By `peft_type`.
FORMATS: dict[str, Format] = {"LORA": low_rank.FORMAT, "IA3": ia3.FORMAT}

# Fields that say where an adapter is from, and which modules it is for: the names of its tensors say that, too.
_IRRELEVANT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "exclude_modules", "fan_in_fan_out", "target_modules"),
}


def format_of(kind: str) -> str | None:
    """The `peft_type` of adapters with this `tune.adapter.name`; None where it is not written."""
    return next((name for name, one in FORMATS.items() if kind in one.adapters), None)


def write_adapter(directory: Path, adapter: Adapter, model: ModelConfig, base: str) -> list[str]:
    """Write an adapter for PEFT; the names of the files. `base` says where the model that it is for may be found.

    Raises ConfigError for a model of no family, or adapters that PEFT has no place for; CheckpointError for a directory
    that is not empty or cannot be written.
    """
    family, peft_type = family_for(model), format_of(adapter.cfg.name)
    assert peft_type is not None
    of_kind, tensors = FORMATS[peft_type].write(adapter, modules(model, family), model)
    values = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "fan_in_fan_out": family.model_type == "gpt2",
        "inference_mode": True,
        **of_kind,
    }
    if directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} holds other files; choose a new or empty --out")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shapes = {name: x.shape for name, x in tensors.items()}
        write_file(directory / WEIGHTS, shapes, iter(tensors.values()), np.dtype("float32"))
        (directory / CONFIG).write_text(json.dumps(values, indent=2))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written ({error.strerror or error}); choose another") from None
    return [WEIGHTS, CONFIG]


def read_adapter(directory: Path, model: ModelConfig) -> Adapter:
    """An adapter of PEFT for this model.

    Raises ConfigError for what would be another function here, or is for other modules; CheckpointError for files that
    are damaged.
    """
    where, values = str(directory / CONFIG), read_json(directory / CONFIG)
    one = FORMATS.get(str(values.get("peft_type")))
    if one is None:
        raise ConfigError(
            f"{where}: peft_type={json.dumps(values.get('peft_type'))[:80]} is not supported; there is "
            f"{', '.join(FORMATS)}"
        )
    for name, value in values.items():
        known = name in one.reads | one.irrelevant | _IRRELEVANT
        if not known and value not in one.required.get(name, (None, False, [], {})):
            raise ConfigError(f"{where}: {name}={json.dumps(value)[:80]} is not supported; it must be left out")
    saved = Saved(directory, values, _tensors(directory))
    return one.read(saved, modules(model, family_for(model)), model)


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    if not (directory / WEIGHTS).exists():
        raise CheckpointError(f"{directory} holds no {WEIGHTS}; give the directory of an adapter saved by PEFT")
    stored = list_file(directory / WEIGHTS)
    if copies := [name for name in stored if name.endswith(".base_layer.weight")]:
        logger.warning("%s has a copy of the base's own %s; that of the base is used", directory / WEIGHTS, copies[0])
    own = {name: one for name, one in stored.items() if name not in copies}
    return {name: np.asarray(x, np.float32) for name, x in read_tensors(own)}
