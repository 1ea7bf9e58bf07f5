"""The modules of a Hugging Face model that can have an adapter, as the family's table of tensors says.

{module}.weight is a tensor of the table (hf/families.py), and so it is known how its axes are ours. Where a module
holds several of our weights side by side, as GPT-2's c_attn does, each is one part of it.
"""

import re
from typing import NamedTuple

from lmjax.finetune.low_rank import fits
from lmjax.hf.config_json import Family
from lmjax.hf.tensors import Expected, Place, expected, merged_shape
from lmjax.models.config import ModelConfig
from lmjax.models.decoder import weights
from lmjax.weights import Weight

HEAD = "lm_head"


class Module(NamedTuple):
    name: str
    tensor: Expected
    """Its matrix, or its table."""
    ins: str
    outs: str
    """The axes of one part of it, as in `(heads head_dim)`."""

    @property
    def weight(self) -> Weight:
        """The declaration of its first part, by whose axes the layouts go: GPT-2's heads are key heads, too."""
        return self.tensor.places[0].weight

    @property
    def last_part(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def is_experts(self) -> bool:
        return "experts" in self.weight.batch_axes

    def key(self, suffix: str) -> str:
        return key_of(self.name, suffix)

    def beside(self, weight: Weight, layout: str) -> Expected:
        """What stands beside one part, declared as one that is not stacked, as PEFT lays it out."""
        return Expected(self.name, merged_shape(layout, weight, 1), layout, (Place("", weight, ()),))


def key_of(module: str, suffix: str) -> str:
    """The name of a tensor that PEFT keeps with a module."""
    return f"base_model.model.{module}.{suffix}"


def modules(model: ModelConfig, family: Family) -> dict[str, Module]:
    """By name. Routers are no linear modules there."""
    found = {}
    for name, one in expected(family.tensors, weights(model), model.segments).items():
        weight = one.places[0].weight
        if not fits(weight) or weight.float32:
            continue
        first, second = re.findall(r"\([^)]*\)|\S+", one.layout.replace("parts ", ""))
        ins, outs = (first, second) if {*re.findall(r"\w+", first)} == {*weight.in_axes} else (second, first)
        module = name.removesuffix(".weight")
        found[module] = Module(module, one, ins, outs)
    return found
