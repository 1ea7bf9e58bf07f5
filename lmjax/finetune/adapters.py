"""The kinds of adapters: small weights that are trained beside a frozen one. A new one is one file and a line here."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lmjax.finetune import bottleneck, dora, ia3, low_rank, prefix, prompt
from lmjax.models.read import Compound
from lmjax.train.config import AdapterConfig
from lmjax.weights import Params, Spec, Weight


class Adapter(NamedTuple):
    """What stands beside one weight; `cfg` is the same for all of them."""

    fits: Callable[[Weight], bool]
    """Whether a weight can have one."""
    weights: Callable[[Weight, AdapterConfig], Spec]
    """What is trained, copy by copy of the weight."""
    attached: Callable[[Weight, AdapterConfig, Any, Any, jax.Array | None], Compound]
    """(declaration, cfg, the stored weight, what is beside it, keys of dropout [L, B]) -> what the model reads."""
    settings: tuple[str, ...] = ()
    """Those of `tune.adapter` that it reads beside its name and targets."""
    place: tuple[str, ...] = ()
    """The weights beside which it always stands; if there are none, `tune.adapter.targets` names them."""
    check: Callable[[Sequence[str]], None] = lambda targets: None
    """Raises ConfigError for weights beside which it cannot stand together."""
    start: Callable[[Weight, Any], Params] | None = None
    """(declaration, the stored weight) -> those of `weights` that start from what the weight is, not as declared."""


_OF_LORA = ("rank", "alpha", "rank_stabilized", "dropout")

# Adapters by the names that `tune.adapter.name` takes.
ADAPTERS: dict[str, Adapter] = {
    "lora": Adapter(low_rank.fits, low_rank.weights, low_rank.attached, _OF_LORA),
    "dora": Adapter(dora.fits, dora.weights, dora.attached, _OF_LORA, start=dora.start),
    "bottleneck": Adapter(bottleneck.fits, bottleneck.weights, bottleneck.attached, ("rank",)),
    "ia3": Adapter(ia3.fits, ia3.weights, ia3.attached),
    "prompt": Adapter(prompt.fits, prompt.weights, prompt.attached, ("length",), place=("embed",)),
    "prefix": Adapter(prefix.fits, prefix.weights, prefix.attached, ("length",), check=prefix.check),
}
