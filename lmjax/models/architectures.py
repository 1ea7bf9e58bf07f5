"""The architectures that `model.architecture` names: each builds a Model of a config."""

from collections.abc import Callable

from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.models.model import Model

ARCHITECTURES: dict[str, Callable[..., Model]] = {
    "decoder": decoder.build,
}
"""(cfg, *, microbatches) -> the model of a config whose vocabulary is known; `microbatches` are those of a pipeline."""


def build(cfg: ModelConfig, *, microbatches: int | None = None) -> Model:
    """The model of a config. Raises ConfigError for one without a vocabulary."""
    return ARCHITECTURES[cfg.architecture](cfg, microbatches=microbatches)
