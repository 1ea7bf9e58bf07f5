"""LoRA in the format of PEFT, both ways: adapter_config.json and adapter_model.safetensors.

    base_model.model.{module}.lora_A.weight         [rank, in]
    base_model.model.{module}.lora_B.weight         [out, rank]
    base_model.model.{module}.lora_embedding_A, _B  [rank, vocab], [embed, rank]

{module}.weight is a tensor of the family's table (hf/families.py), which says how its axes are ours. Where a module
holds several of our weights side by side, as GPT-2's c_attn does, they share A there, while each has its own here.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmjax.errors import CheckpointError, ConfigError
from lmjax.finetune.low_rank import factors, fits
from lmjax.hf.config_json import Family, read_json
from lmjax.hf.families import family_for
from lmjax.hf.shards import list_file, read_tensors, write_file
from lmjax.hf.tensors import Expected, Place, expected, join, merged_shape, split
from lmjax.models.config import ModelConfig
from lmjax.models.decoder import weights
from lmjax.schema import validated
from lmjax.train.config import AdapterConfig
from lmjax.weights import Params, Weight, by_path, nested

logger = logging.getLogger(__name__)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Fields of adapter_config.json with the values that mean LoRA beside the weights of the base as they are: some ways to
# start (pissa, olora, ...) change the base.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern"}
# Where an adapter is from, and what the tensors say themselves: their modules, shapes and ranks.
_IRRELEVANT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "revision"),
    *("task_type", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform"),
    *("qalora_group_size", "rank_pattern", "target_modules"),
}


class LowRankAdapter(NamedTuple):
    """What a directory holds."""

    cfg: AdapterConfig
    params: Params
    """`{"down", "up"}` at the path of each weight that has an adapter, stacked as it is."""


class Module(NamedTuple):
    """A module of the other side: a tensor of the family's table, its name without `.weight`."""

    name: str
    tensor: Expected
    ins: str
    outs: str
    """The axes of one part of it, as in `(heads head_dim)`."""

    def expected_of(self, place: Place, rank: int) -> tuple[Expected, Expected]:
        """A and B of one part, whose axes go by the names of the first: GPT-2's heads are key heads, too."""
        beside = factors(self.tensor.places[0].weight.unstacked(), rank)

        def of(weight: Weight, layout: str) -> Expected:
            return Expected(self.name, merged_shape(layout, weight, 1), layout, (Place(place.path, weight, ()),))

        return of(beside["down"], f"rank {self.ins}"), of(beside["up"], f"{self.outs} rank")

    @property
    def factors(self) -> tuple[str, str]:
        """The names of A and B."""
        table = self.tensor.places[0].weight.kind == "lookup"
        first, second = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
        return f"{_PREFIX}{self.name}.{first}", f"{_PREFIX}{self.name}.{second}"


def modules(model: ModelConfig, family: Family) -> dict[str, Module]:
    """The modules that can have an adapter, by name."""
    found = {}
    for name, one in expected(family.tensors, weights(model), model.segments).items():
        weight = one.places[0].weight
        if not fits(weight) or weight.float32 or "experts" in weight.batch_axes:
            continue  # routers and experts are no linear modules there
        groups = re.findall(r"\([^)]*\)|\S+", one.layout.replace("parts ", ""))
        first, second = groups
        ins, outs = (first, second) if {*re.findall(r"\w+", first)} == {*weight.in_axes} else (second, first)
        module = name.removesuffix(".weight")
        found[module] = Module(module, one, ins, outs)
    return found


def _check_tables(model: ModelConfig, paths: Mapping[str, Any], where: str) -> None:
    if model.tied and "embed" in paths:
        raise ConfigError(
            f"{where}: the embedding is the head, too, and PEFT's adapter would act on the one alone; leave it out"
        )


# Out --------------------------------------------------------------------------------------------------------------


def write_adapter(directory: Path, adapter: LowRankAdapter, model: ModelConfig, base: str) -> list[str]:
    """Write an adapter for PEFT; the names of the files. `base` says where the model that it is for may be found.

    Raises ConfigError for a model of no family, or adapters that PEFT has no place for; CheckpointError for a directory
    that is not empty or cannot be written.
    """
    family = family_for(model)
    beside = {path.rpartition("/")[0] for path in by_path(adapter.params)}
    _check_tables(model, dict.fromkeys(beside), "tune.adapter")
    every = modules(model, family)
    held = {name: one for name, one in every.items() if any(place.path in beside for place in one.tensor.places)}
    if lost := sorted(beside - {place.path for one in held.values() for place in one.tensor.places}):
        raise ConfigError(f"tune.adapter: PEFT has no place for adapters beside {lost[0]}; use lmjax merge")
    tensors: dict[str, np.ndarray] = {}
    for one in held.values():
        tensors |= dict(zip(one.factors, _joined(one, by_path(adapter.params), adapter.cfg.rank), strict=True))
    values = _settings(adapter.cfg, every, held, base) | {"fan_in_fan_out": family.model_type == "gpt2"}
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


def _settings(cfg: AdapterConfig, every: Mapping[str, Module], held: Mapping[str, Module], base: str) -> dict[str, Any]:
    """adapter_config.json. A module of several parts has their ranks together, and counts as much as each of them."""
    parts = {name.rpartition(".")[2]: len(one.tensor.places) for name, one in held.items()}
    widened = {name: number for name, number in parts.items() if number > 1}
    power = 0.5 if cfg.rank_stabilized else 1.0
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "use_rslora": cfg.rank_stabilized,
        "target_modules": _targets(every, held),
        "bias": "none",
        "rank_pattern": {name: number * cfg.rank for name, number in widened.items()},
        "alpha_pattern": {name: number**power * cfg.alpha for name, number in widened.items()},
        "inference_mode": True,
    }


def _joined(one: Module, leaves: Mapping[str, Any], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a module. Of several parts the As lie one after another, and each part's B reads its own."""
    pairs = []
    for place in one.tensor.places:
        expected_a, expected_b = one.expected_of(place, rank)
        if f"{place.path}/down" not in leaves:
            pairs.append((np.zeros(expected_a.shape, np.float32), np.zeros(expected_b.shape, np.float32)))
            continue
        down, up = (np.asarray(leaves[f"{place.path}/{name}"][place.entry], np.float32) for name in ("down", "up"))
        pairs.append((join(expected_a, [down]), join(expected_b, [up])))
    if len(pairs) == 1:
        return pairs[0]
    a, (out, parts) = np.concatenate([a for a, _ in pairs]), (len(pairs[0][1]), len(pairs))
    b = np.zeros((parts * out, parts * rank), np.float32)
    for part, (_, own) in enumerate(pairs):
        b[part * out : (part + 1) * out, part * rank : (part + 1) * rank] = own
    return a, b


def _targets(every: Mapping[str, Module], held: Mapping[str, Module]) -> list[str]:
    """The last parts of the modules' names where these name no others, else whole names."""
    short = {name.rpartition(".")[2] for name in held}
    named = {name for name in every if name.rpartition(".")[2] in short}
    return sorted(short if named == {*held} else held)


# In ---------------------------------------------------------------------------------------------------------------


def read_adapter(directory: Path, model: ModelConfig) -> LowRankAdapter:
    """An adapter of PEFT for this model. Modules of lower rank are padded with zeros, other alphas go into B.

    Raises ConfigError for what is not plain LoRA, or is for other modules; CheckpointError for files that are damaged.
    """
    where, values = str(directory / CONFIG), read_json(directory / CONFIG)
    for name, value in values.items():
        known = name in _READ | _IRRELEVANT or value in _REQUIRED.get(name, (None, False, [], {}))
        if not known:
            raise ConfigError(f"{where}: {name}={json.dumps(value)[:80]} is not supported; plain LoRA is read")
    found, every = _found(directory), modules(model, family_for(model))
    held = {name: one for name, one in every.items() if {*one.factors} & {*found}}
    if unknown := sorted({*found} - {key for one in held.values() for key in one.factors}):
        raise CheckpointError(f"{directory / WEIGHTS} has {unknown[0]}, which is no LoRA of a module of this model")
    ranks = [found[one.factors[0]].shape[0] for one in held.values() if one.factors[0] in found]
    settings = {
        "rank": max(ranks, default=0),
        "alpha": values.get("lora_alpha"),
        "rank_stabilized": values.get("use_rslora") or False,
        "dropout": values.get("lora_dropout") or 0.0,
        "targets": sorted({place.path for one in held.values() for place in one.tensor.places}),
    }
    cfg = validated(AdapterConfig, settings, f"{where}: ")
    _check_tables(model, dict.fromkeys(cfg.targets), where)
    spec = by_path(weights(model))
    leaves = {
        f"{path}/{name}": np.zeros(one.shape, np.float32)
        for path in cfg.targets
        for name, one in factors(spec[path], cfg.rank).items()
    }
    for one in held.values():
        _fill(leaves, one, found, cfg, _alpha(values, one.name), directory / WEIGHTS)
    return LowRankAdapter(cfg, nested(leaves))


def _found(directory: Path) -> dict[str, np.ndarray]:
    if not (directory / WEIGHTS).exists():
        raise CheckpointError(f"{directory} holds no {WEIGHTS}; give the directory of an adapter saved by PEFT")
    stored = list_file(directory / WEIGHTS)
    if copies := [name for name in stored if name.endswith(".base_layer.weight")]:
        logger.warning("%s has a copy of the base's own %s; that of the base is used", directory / WEIGHTS, copies[0])
    own = {name: one for name, one in stored.items() if name not in copies}
    return {name: np.asarray(x, np.float32) for name, x in read_tensors(own)}


def _alpha(values: Mapping[str, Any], module: str) -> float:
    for pattern, alpha in (values.get("alpha_pattern") or {}).items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise ConfigError(f"{CONFIG}: alpha_pattern has '{pattern[:80]}'; only names of modules are understood")
        if f".{module}".endswith(f".{pattern}"):
            return float(alpha)
    return float(values["lora_alpha"])


def _fill(
    leaves: dict[str, np.ndarray],
    one: Module,
    found: Mapping[str, np.ndarray],
    cfg: AdapterConfig,
    alpha: float,
    file: Path,
) -> None:
    """Put a module's factors where they belong."""
    key_a, key_b = one.factors
    if key_a not in found or key_b not in found:
        raise CheckpointError(f"{file} has {key_a if key_a in found else key_b} without its other factor")
    a, b, parts = found[key_a], found[key_b], len(one.tensor.places)
    rank = len(a)
    for part, place in enumerate(one.tensor.places):
        expected_a, expected_b = one.expected_of(place, rank)
        out = expected_b.shape[0]
        if a.shape != expected_a.shape or b.shape != (parts * out, rank):
            raise CheckpointError(
                f"{file}: {key_a} and its B are {a.shape} and {b.shape}, for this model they must be "
                f"{expected_a.shape} and {(parts * out, rank)}"
            )
        (down,), (up,) = split(expected_a, a), split(expected_b, b[part * out : (part + 1) * out])
        power = 0.5 if cfg.rank_stabilized else 1.0
        scale = (alpha / rank**power) / (cfg.alpha / cfg.rank**power)
        leaves[f"{place.path}/down"][place.entry][..., :rank] = down
        leaves[f"{place.path}/up"][place.entry][:rank] = up * np.float32(scale)
