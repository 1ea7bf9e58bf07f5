"""What a user sets about checkpoints and about where numbers go; free of JAX."""

from typing import Literal

from lmjax.schema import NonNegativeInt, PositiveInt, config_class


@config_class
class CheckpointConfig:
    """When to save and what to keep."""

    every: PositiveInt | None = 1000
    """Steps between checkpoints; None saves only at the end and when preempted."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this are kept for ever."""
    keep_best: NonNegativeInt = 0
    """Checkpoints with the lowest validation loss that are kept."""
    verify: bool = True
    """Hash every file again after sealing and before restoring (about 3 s per GB); else only sizes are compared."""


@config_class
class TrackingConfig:
    """Weights & Biases; metrics.jsonl and the console are always there."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Online falls back to offline without a network or a key; `wandb sync` uploads later."""
    project: str = "lmjax"
    entity: str | None = None
    group: str | None = None
    """The sweep or experiment that this run belongs to."""
    tags: tuple[str, ...] = ()
    name: str | None = None
    """A short human name; None lets the run choose one from its config."""
