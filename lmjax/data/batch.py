"""What a step sees of the data."""

from typing import Any

import flax.struct


@flax.struct.dataclass
class Batch:
    """Rows of a global batch; numpy on the host, sharded over `batch` on the device.

    `segments` and `positions` are None unless documents are kept apart (`data.documents = "separate"`).
    """

    tokens_BT: Any
    """int32 inputs."""
    targets_BT: Any
    """int32, the token that follows each input."""
    weights_BT: Any
    """float32, the loss weight of each target; 0 leaves it out."""
    ids_B: Any
    """int32, each row's global sample index (modulo 2^31): names its dropout masks."""
    segments_BT: Any | None = None
    """int32, which document of its row a token belongs to."""
    positions_BT: Any | None = None
    """int32, counted from each document's start."""
