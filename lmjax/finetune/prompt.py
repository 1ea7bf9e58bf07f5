"""Soft prompts: trained embeddings in place of tokens, in front of every text (Lester et al. 2021, arXiv:2104.08691).

Nothing else is trained. The prompt starts as the embeddings of tokens spread over the vocabulary, which teaches more
than random numbers (section 3.2 there), and what is trained is how far it moves from them. It is no weight of the
model, so nothing can be merged. How it gets in front of a text: models/front.py.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax

from lmjax.errors import ConfigError
from lmjax.train.config import AdapterConfig
from lmjax.weights import Spec, Weight, zeros


@flax.struct.dataclass
class SoftPrompt:
    """A stored table of tokens with a prompt: a `Compound` (models/read.py)."""

    table: Any
    prompt_PD: jax.Array
    """What is added to the embeddings that the prompt starts from."""

    @property
    def places(self) -> int:
        return len(self.prompt_PD)

    def as_array(self, weight: Weight) -> jax.Array:
        raise ConfigError("tune.adapter.name=prompt: a prompt in front of texts is no weight; it cannot be merged")

    def map_parts(self, function: Callable[[Weight, Any], Any], weight: Weight) -> "SoftPrompt":
        return SoftPrompt(function(weight, self.table), function(prompt(weight, self.places), self.prompt_PD))

    def multiply(self, x: jax.Array, dot: Callable[..., jax.Array], *, rows_out: bool = False) -> jax.Array:
        return dot(x, self.table)

    def lookup(self, rows: Callable[[Any], jax.Array]) -> jax.Array:
        return rows(self.table)


def fits(weight: Weight) -> bool:
    """Tables of tokens."""
    return weight.kind == "lookup" and "vocab" in weight.in_axes


def prompt(weight: Weight, length: int) -> Weight:
    return Weight("prompt -> embed", kind="lookup", init=zeros, sizes=(length, weight.sizes[-1]))


def weights(weight: Weight, cfg: AdapterConfig) -> Spec:
    return {"prompt": prompt(weight, cfg.length)}


def attached(weight: Weight, cfg: AdapterConfig, base: Any, beside: Any, keys: jax.Array | None) -> SoftPrompt:
    return SoftPrompt(base, beside["prompt"])
