"""When checkpoints are made and which are kept: what a user sets; checkpoint.py makes them."""

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
