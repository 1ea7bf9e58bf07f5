"""What it takes to read a kind of adapter from PEFT's files, and to write it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmjax.errors import ConfigError
from lmjax.finetune.peft.modules import Module
from lmjax.models.config import ModelConfig
from lmjax.train.config import AdapterConfig
from lmjax.weights import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapter(NamedTuple):
    """What a directory holds."""

    cfg: AdapterConfig
    params: Params
    """What stands beside each weight, at its path, stacked as it is."""


class Saved(NamedTuple):
    """The content of a directory."""

    directory: Path
    values: Mapping[str, Any]
    """adapter_config.json"""
    tensors: Mapping[str, np.ndarray]
    """float32, by their names."""

    @property
    def config(self) -> Path:
        return self.directory / CONFIG

    @property
    def weights(self) -> Path:
        return self.directory / WEIGHTS


class Written(NamedTuple):
    """What goes into a directory."""

    values: Mapping[str, Any]
    """The fields of adapter_config.json that are of this kind."""
    tensors: Mapping[str, np.ndarray]


class Format(NamedTuple):
    """One `peft_type`."""

    adapters: tuple[str, ...]
    """The names of `tune.adapter.name` that are written so."""
    reads: frozenset[str]
    """The fields of adapter_config.json that say something."""
    irrelevant: frozenset[str]
    """Those that do not: the tensors say it themselves."""
    required: Mapping[str, tuple[Any, ...]]
    """Those of which only these values mean what is computed here."""
    read: Callable[[Saved, Mapping[str, Module], ModelConfig], Adapter]
    write: Callable[[Adapter, Mapping[str, Module], ModelConfig], Written]


def held_by(every: Mapping[str, Module], paths: set[str]) -> dict[str, Module]:
    """The modules that hold the weights at these paths. Raises ConfigError for a weight that none does."""
    held = {name: one for name, one in every.items() if any(place.path in paths for place in one.tensor.places)}
    if lost := sorted(paths - {place.path for one in held.values() for place in one.tensor.places}):
        raise ConfigError(f"tune.adapter: PEFT has no place for adapters beside {lost[0]}; use lmjax merge")
    return held


def target_modules(every: Mapping[str, Module], held: Mapping[str, Module]) -> list[str]:
    """The last parts of the modules' names where these name no others, else whole names."""
    short = {one.last_part for one in held.values()}
    named = {name for name, one in every.items() if one.last_part in short}
    return sorted(short if named == {*held} else held)
