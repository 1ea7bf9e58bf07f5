"""LoRA beside experts, as PEFT keeps it for models that hold the experts of a layer in one array (`target_parameters`):

    {layer}.mlp.experts.base_layer.lora_A.weight    [experts x rank, embed]
    {layer}.mlp.experts.base_layer.lora_B.weight    [gate and up, rank x experts]
    {layer}.mlp.experts.lora_A.weight, lora_B       the same of down_proj

Without adapters beside gate_up_proj there is no base_layer in the names. Gate and up share A. What is written here has
a module for each expert, as checkpoints have; PEFT reads that, too, and makes of it this.
"""

import re
from collections.abc import Mapping

import numpy as np

from lmjax.errors import CheckpointError, ConfigError
from lmjax.finetune.peft.format import Saved
from lmjax.finetune.peft.modules import Module

_FUSED = re.compile(r"base_model\.model\.(model\.layers\.\d+)\.mlp\.experts(\.base_layer)?\.lora_([AB])\.weight")
_PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def apart(saved: Saved, every: Mapping[str, Module]) -> tuple[Saved, dict[str, str]]:
    """What is saved with a module for each expert, and the names that PEFT's patterns have for these modules.

    Raises ConfigError for other parameters than those of experts, CheckpointError for tensors of other sizes.
    """
    targets = {str(name).rpartition(".")[2] for name in saved.values.get("target_parameters") or ()}
    if unknown := sorted(targets - {*_PARTS}):
        raise ConfigError(f"{saved.config}: target_parameters has {unknown[0]}; only those of experts are read")
    experts = _by_layer(every)
    tensors, fused = dict(saved.tensors), {}
    for key, x in saved.tensors.items():
        named = _FUSED.fullmatch(key)
        if named is None or named[1] not in experts or not targets:
            continue
        parameter = "gate_up_proj" if named[2] or "down_proj" not in targets else "down_proj"
        del tensors[key]
        for one, own in _split(x, named[3], [experts[named[1]][part] for part in _PARTS[parameter]], key):
            tensors[one.key(f"lora_{named[3]}.weight")] = own
            fused[one.name] = f"{named[1]}.mlp.experts.{parameter}"
    return saved._replace(tensors=tensors), fused


def _by_layer(every: Mapping[str, Module]) -> dict[str, dict[str, list[Module]]]:
    """{layer: {gate, up or down: the modules of its experts, in their order}}."""
    found: dict[str, dict[str, list[Module]]] = {}
    for one in every.values():
        if one.is_experts:
            layer, part = ".".join(one.name.split(".")[:3]), one.tensor.places[0].path.rpartition("/")[2]
            found.setdefault(layer, {}).setdefault(part, []).append(one)
    return found


def _split(x: np.ndarray, side: str, parts: list[list[Module]], key: str) -> list[tuple[Module, np.ndarray]]:
    """Of A or B of all experts that of each part of each."""
    E = len(parts[0])
    if x.ndim != 2 or x.shape[0 if side == "A" else 1] % E or (side == "B" and len(x) % len(parts)):
        raise CheckpointError(f"{key} is {x.shape}, which is nothing of {E} experts")
    if side == "A":
        x_ERI = x.reshape(E, -1, x.shape[1])
        return [(part[e], x_ERI[e]) for part in parts for e in range(E)]
    x_POER = x.reshape(len(parts), len(x) // len(parts), -1, E).swapaxes(2, 3)
    return [(part[e], x_POER[p, :, e]) for p, part in enumerate(parts) for e in range(E)]


def check_writable(held: Mapping[str, Module], every: Mapping[str, Module]) -> None:
    """Raise ConfigError for adapters beside experts that PEFT would take for others."""
    beside = {one.tensor.places[0].path.rpartition("/")[2] for one in held.values() if one.is_experts}
    if len(beside & {"gate", "up"}) == 1:
        raise ConfigError(
            "tune.adapter: PEFT holds what is beside gate and up of experts in one; target both or neither"
        )
    names = {one.last_part for one in every.values() if one.is_experts}
    if dense := [name for name, one in held.items() if not one.is_experts and one.last_part in names]:
        raise ConfigError(f"tune.adapter: PEFT takes {dense[0]} for one of experts; leave it out, or use lmjax merge")
