"""LoRA and DoRA in PEFT's files:

    base_model.model.{module}.lora_A.weight           [rank, in]
    base_model.model.{module}.lora_B.weight           [out, rank]
    base_model.model.{module}.lora_magnitude_vector   [out], of DoRA
    base_model.model.{module}.lora_embedding_A, _B    [rank, vocab], [embed, rank]

Modules of several parts share A there, while each part has its own here. A table that is the head, too, has one adapter
here and two there, of which one is the other transposed (`ensure_weight_tying`). Experts have a module each; PEFT also
reads and writes them fused (experts.py).
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.errors import CheckpointError, ConfigError
from lmjax.finetune import dora, low_rank
from lmjax.finetune.peft import experts
from lmjax.finetune.peft.format import Adapter, Format, Saved, Written, held_by, target_modules
from lmjax.finetune.peft.modules import HEAD, Module, key_of
from lmjax.hf.tensors import Expected, join, split
from lmjax.models.config import ModelConfig
from lmjax.models.decoder import weights
from lmjax.schema import validated
from lmjax.train.config import AdapterConfig
from lmjax.weights import Weight, by_path, nested

logger = logging.getLogger(__name__)
_SIDES = ("down", "up")


def names_of(one: Module) -> dict[str, str]:
    """The tensors that may stand beside a module, by what they are here."""
    table = one.weight.kind == "lookup"
    down, up = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
    return {"down": one.key(down), "up": one.key(up), "magnitude": one.key("lora_magnitude_vector")}


def expected_of(one: Module, rank: int) -> dict[str, Expected]:
    """These for one part of a module."""
    weight = one.weight.unstacked()
    pair = low_rank.factors(weight, rank)
    return {
        "down": one.beside(pair["down"], f"rank {one.ins}"),
        "up": one.beside(pair["up"], f"{one.outs} rank"),
        "magnitude": one.beside(dora.magnitudes(weight), one.outs),
    }


# Out --------------------------------------------------------------------------------------------------------------


def write(adapter: Adapter, every: Mapping[str, Module], model: ModelConfig) -> Written:
    """Raises ConfigError for adapters that PEFT has no place for."""
    cfg, leaves = adapter.cfg, by_path(adapter.params)
    paths = {path.rpartition("/")[0] for path in leaves}
    held = held_by(every, paths)
    experts.check_writable(held, every)
    tensors: dict[str, np.ndarray] = {}
    for one in held.values():
        tensors |= _joined(one, leaves, cfg)
    names, tied = target_modules(every, held), model.tied and "embed" in paths
    if tied:
        (table,) = (one for one in held.values() if one.weight.tied)
        a, b = (tensors[names_of(table)[side]] for side in _SIDES)
        tensors |= dict(zip(_head_names(), (b.T.copy(), a.T.copy()), strict=True))
        names = [*names, HEAD]
    return Written(_settings(cfg, held) | {"target_modules": names, "ensure_weight_tying": tied}, tensors)


def _head_names() -> tuple[str, str]:
    return key_of(HEAD, "lora_A.weight"), key_of(HEAD, "lora_B.weight")


def _settings(cfg: AdapterConfig, held: Mapping[str, Module]) -> dict[str, Any]:
    """Fields of adapter_config.json. A module of several parts has their ranks together, and counts as much as each.

    Where PEFT fuses experts it takes every scale for one over the rank: so it is written as one.
    """
    widened = {one.last_part: len(one.tensor.places) for one in held.values() if len(one.tensor.places) > 1}
    by_root = cfg.rank_stabilized and not any(one.is_experts for one in held.values())
    alpha = cfg.alpha * cfg.rank**0.5 if cfg.rank_stabilized and not by_root else cfg.alpha
    power = 0.5 if by_root else 1.0
    return {
        "r": cfg.rank,
        "lora_alpha": alpha,
        "lora_dropout": cfg.dropout,
        "use_rslora": by_root,
        "use_dora": cfg.name == "dora",
        "bias": "none",
        "rank_pattern": {name: number * cfg.rank for name, number in widened.items()},
        "alpha_pattern": {name: number**power * alpha for name, number in widened.items()},
    }


def _joined(one: Module, leaves: Mapping[str, Any], cfg: AdapterConfig) -> dict[str, np.ndarray]:
    """The tensors of a module. Of several parts the As lie one after another, and each part's B reads its own."""
    layouts, parts = expected_of(one, cfg.rank), len(one.tensor.places)

    def whole(name: str) -> list[np.ndarray]:
        """Of each part; zeros for one without an adapter."""
        layout, found = layouts[name], []
        for place in one.tensor.places:
            x = leaves.get(f"{place.path}/{name}")
            if x is None and name == "magnitude":
                raise ConfigError(
                    f"tune.adapter: in PEFT {one.name} has magnitudes for {place.path}, too; target that, or use "
                    "lmjax merge"
                )
            blank = np.zeros(layout.shape, np.float32)
            found.append(blank if x is None else join(layout, [np.asarray(x[place.entry], np.float32)]))
        return found

    down, up = np.concatenate(whole("down")), whole("up")
    out, rank = up[0].shape
    blocks = np.zeros((parts * out, parts * rank), np.float32)
    for part, own in enumerate(up):
        blocks[part * out : (part + 1) * out, part * rank : (part + 1) * rank] = own
    found = {"down": down, "up": blocks}
    if cfg.name == "dora":
        found["magnitude"] = np.concatenate(whole("magnitude"))
    return {names_of(one)[name]: x for name, x in found.items()}


# In ---------------------------------------------------------------------------------------------------------------


def read(saved: Saved, every: Mapping[str, Module], model: ModelConfig) -> Adapter:
    """Modules of lower rank are padded with zeros, other alphas go into B."""
    saved, fused = experts.apart(_without_tied_head(saved, every) if model.tied else saved, every)
    found = saved.tensors
    held = {name: one for name, one in every.items() if {*names_of(one).values()} & {*found}}
    if unknown := sorted({*found} - {key for one in held.values() for key in names_of(one).values()}):
        raise CheckpointError(f"{saved.weights} has {unknown[0]}, which is no LoRA of a module of this model")
    cfg, spec = _config(saved, held, model), by_path(weights(model))
    if cfg.name == "dora":
        _check_layers(saved, held, spec)
    kind = dora if cfg.name == "dora" else low_rank
    leaves = {
        f"{path}/{name}": np.zeros(one.shape, np.float32)
        for path in cfg.targets
        for name, one in kind.weights(spec[path], cfg).items()
    }
    for name, one in held.items():
        _fill(leaves, one, saved, cfg, _alpha(saved, fused.get(name, name)))
    return Adapter(cfg, nested(leaves))


def _check_layers(saved: Saved, held: Mapping[str, Module], spec: Mapping[str, Weight]) -> None:
    """Raise ConfigError where some layers have magnitudes and others none: those would need the lengths of the base."""
    places = Counter(place.path for one in held.values() for place in one.tensor.places)
    for path, number in places.items():
        if number < math.prod(spec[path].sizes[: len(spec[path].batch_axes)]):
            raise ConfigError(f"{saved.config}: use_dora, but some layers have none at {path}; give all of them DoRA")


def _config(saved: Saved, held: Mapping[str, Module], model: ModelConfig) -> AdapterConfig:
    values, spec = saved.values, by_path(weights(model))
    ranks = [len(saved.tensors[key]) for one in held.values() if (key := names_of(one)["down"]) in saved.tensors]
    targets = sorted({place.path for one in held.values() for place in one.tensor.places})
    dropout = values.get("lora_dropout") or 0.0
    if dropout and (outside := [path for path in targets if len(spec[path].batch_axes) != 1]):
        logger.warning("%s: lora_dropout is left out, since none acts on '%s' here", saved.config, outside[0])
        dropout = 0.0
    settings = {
        "name": "dora" if values.get("use_dora") else "lora",
        "rank": max(ranks, default=0),
        "alpha": values.get("lora_alpha"),
        "rank_stabilized": values.get("use_rslora") or False,
        "dropout": dropout,
        "targets": targets,
    }
    return validated(AdapterConfig, settings, f"{saved.config}: ")


def _without_tied_head(saved: Saved, every: Mapping[str, Module]) -> Saved:
    """What is saved with one adapter for a table that is the head, too.

    Raises ConfigError unless both of PEFT's are the same.
    """
    (table,) = (one for one in every.values() if one.weight.tied)
    embed, head = [names_of(table)[side] for side in _SIDES], _head_names()
    found = saved.tensors
    both = [name for name in (*embed, *head) if name in found]
    if not both:
        return saved
    same = len(both) == 4 and all(
        np.array_equal(found[a], found[b].T) for a, b in zip(embed, reversed(head), strict=True)
    )
    if not same or _alpha(saved, table.name) != _alpha(saved, HEAD):
        raise ConfigError(
            f"{saved.config}: the embedding is the head, too, and this adapter acts on the one otherwise than on the "
            "other; leave it out, or set ensure_weight_tying"
        )
    return saved._replace(tensors={name: x for name, x in found.items() if name not in head})


def _alpha(saved: Saved, module: str) -> float:
    """What its factors count. PEFT's patterns are regular expressions; those that are names are understood."""
    patterns = saved.values.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise ConfigError(f"{saved.config}: alpha_pattern={json.dumps(patterns)[:80]} names no modules")
    named = {pattern.removeprefix(r".*\.").replace(r"\.", "."): alpha for pattern, alpha in patterns.items()}
    if unknown := [name for name in named if not re.fullmatch(r"[\w.]+", name)]:
        raise ConfigError(
            f"{saved.config}: alpha_pattern has '{unknown[0][:80]}'; only names of modules are understood"
        )
    fitting = (alpha for name, alpha in named.items() if f".{module}".endswith(f".{name}"))
    alpha = next(fitting, saved.values.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise ConfigError(f"{saved.config}: the alpha of {module} is {json.dumps(alpha)[:80]}; it must be a number")
    return float(alpha)


def _fill(leaves: dict[str, np.ndarray], one: Module, saved: Saved, cfg: AdapterConfig, alpha: float) -> None:
    """Put a module's tensors where they belong."""
    names, found, parts = names_of(one), saved.tensors, len(one.tensor.places)
    if lacking := [names[side] for side in _SIDES if names[side] not in found]:
        raise CheckpointError(f"{saved.weights} lacks {lacking[0]}, but has its other factor")
    rank = len(found[names["down"]])
    layouts = expected_of(one, rank)
    wanted = {"down": layouts["down"].shape, "up": (parts * layouts["up"].shape[0], rank)}
    if cfg.name == "dora":
        wanted["magnitude"] = (parts * layouts["magnitude"].shape[0],)
    _check_shapes(saved.weights, {names[name]: shape for name, shape in wanted.items()}, found)
    power = 0.5 if cfg.rank_stabilized else 1.0
    scale = np.float32((alpha / rank**power) / (cfg.alpha / cfg.rank**power))
    (down,) = split(layouts["down"], found[names["down"]])
    for part, place in enumerate(one.tensor.places):

        def own(name: str, part: int = part) -> Any:
            size = layouts[name].shape[0]
            return split(layouts[name], found[names[name]][part * size : (part + 1) * size])[0]

        leaves[f"{place.path}/down"][place.entry][..., :rank] = down
        leaves[f"{place.path}/up"][place.entry][:rank] = own("up") * scale
        if cfg.name == "dora":
            leaves[f"{place.path}/magnitude"][place.entry] = own("magnitude")


def _check_shapes(file: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, np.ndarray]) -> None:
    for key, shape in wanted.items():
        has = found[key].shape if key in found else None
        if has != shape:
            raise CheckpointError(f"{file}: {key} is {has}, for this model it must be {shape}")


FORMAT = Format(
    adapters=("lora", "dora"),
    reads=frozenset({"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "alpha_pattern"}),
    irrelevant=frozenset(
        "megatron_core ensure_weight_tying layers_pattern layers_to_transform qalora_group_size rank_pattern "
        "target_parameters".split()
    ),
    # Some ways to start (pissa, olora, ...) change the base.
    required={"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")},
    read=read,
    write=write,
)
