"""(IA)^3 in PEFT's files:

    base_model.model.{module}.ia3_l    [out, 1], or of `feedforward_modules` [1, in]

What a module gives is rescaled there with its bias, here without it; so only modules without one mean the same.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lmjax.errors import CheckpointError, ConfigError
from lmjax.finetune.ia3 import rescales_inputs, vector
from lmjax.finetune.peft.format import Adapter, Format, Saved, Written, held_by, target_modules
from lmjax.finetune.peft.modules import Module
from lmjax.hf.tensors import Expected, join, split
from lmjax.models.config import ModelConfig
from lmjax.models.decoder import weights
from lmjax.train.config import AdapterConfig
from lmjax.weights import by_path, nested


def write(adapter: Adapter, every: Mapping[str, Module], model: ModelConfig) -> Written:
    leaves = by_path(adapter.params)
    held = held_by(every, {path.removesuffix("/by") for path in leaves})
    tensors = {}
    for one, layout in _vectors(held, model, "tune.adapter"):
        (place,) = one.tensor.places
        x = join(layout, [np.asarray(leaves[f"{place.path}/by"][place.entry], np.float32)])
        tensors[one.key("ia3_l")] = x[None] if rescales_inputs(one.weight) else x[:, None]
    reads = {name: one for name, one in held.items() if rescales_inputs(one.weight)}
    names = target_modules(every, held)
    feedforward = [name for name in names if any(f".{module}".endswith(f".{name}") for module in reads)]
    return Written({"target_modules": names, "feedforward_modules": feedforward}, tensors)


def read(saved: Saved, every: Mapping[str, Module], model: ModelConfig) -> Adapter:
    """Layers that have none are rescaled by ones."""
    held = {name: one for name, one in every.items() if one.key("ia3_l") in saved.tensors}
    if unknown := sorted({*saved.tensors} - {one.key("ia3_l") for one in held.values()}):
        raise CheckpointError(f"{saved.weights} has {unknown[0]}, which rescales no module of this model")
    spec = by_path(weights(model))
    targets = sorted({place.path for one in held.values() for place in one.tensor.places})
    leaves: dict[str, Any] = {f"{path}/by": np.ones(vector(spec[path]).shape, np.float32) for path in targets}
    for one, layout in _vectors(held, model, str(saved.config)):
        x, (place,) = saved.tensors[one.key("ia3_l")], one.tensor.places
        inputs = rescales_inputs(one.weight)
        wanted = (1, *layout.shape) if inputs else (*layout.shape, 1)
        if x.shape != wanted:
            side = "reads" if inputs else "gives"
            raise CheckpointError(
                f"{saved.weights}: {one.key('ia3_l')} is {x.shape}, and to rescale what this module {side} it must be "
                f"{wanted}"
            )
        (leaves[f"{place.path}/by"][place.entry],) = split(layout, x.reshape(layout.shape))
    return Adapter(AdapterConfig(name="ia3", targets=tuple(targets)), nested(leaves))


def _vectors(held: Mapping[str, Module], model: ModelConfig, where: str) -> Iterator[tuple[Module, Expected]]:
    """Each module with its vector. Raises ConfigError for one that would be another function."""
    spec = by_path(weights(model))
    for one in held.values():
        inputs = rescales_inputs(one.weight)
        if not inputs and any(f"{place.path}_bias" in spec for place in one.tensor.places):
            raise ConfigError(
                f"{where}: (IA)^3 rescales the bias of {one.name} in PEFT, not here; leave that module out"
            )
        yield one, one.beside(vector(one.weight.unstacked()), one.ins if inputs else one.outs)


FORMAT = Format(
    adapters=("ia3",),
    reads=frozenset(),
    irrelevant=frozenset({"feedforward_modules", "init_ia3_weights"}),
    required={},
    read=read,
    write=write,
)
