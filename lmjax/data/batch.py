"""What a step sees of the data.

window  T + 1 tokens in a row of a source's stream: T inputs, and T targets, each one token later
sample  one window, or row of whole documents, in the order of training, named by its global index, from 0 at the start
        of the run
row     a sample's place in the arrays of a batch
"""

from typing import Any

import flax.struct

from lmjax.devices.rows import axes


@flax.struct.dataclass
class Batch:
    """Rows of a global batch; numpy on the host, sharded over `batch` on the device.

    `segments` and `positions` are None unless documents are kept apart (`data.documents` is not `joined`).
    """

    tokens_BT: Any = axes("batch time")
    """int32 inputs."""
    targets_BT: Any = axes("batch time")
    """int32, the token that follows each input."""
    weights_BT: Any = axes("batch time")
    """float32, the loss weight of each target; 0 leaves it out."""
    ids_B: Any = axes("batch")
    """int32, each row's global sample index (modulo 2^31): names its dropout masks."""
    segments_BT: Any | None = axes("batch time", default=None)
    """int32, which document of its row a token belongs to; -1 for padding."""
    positions_BT: Any | None = axes("batch time", default=None)
    """int32, counted from each document's start; -1 for padding."""
