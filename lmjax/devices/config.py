"""How the devices share the work: what a user sets; mesh.py says what follows from it."""

from typing import Annotated

from lmjax.names import names_in
from lmjax.schema import PositiveInt, config_class, one_of


@config_class
class MeshConfig:
    """How the devices share the work: a layout by name, and sizes of single axes where its own do not suit."""

    layout: Annotated[str, one_of(names_in("lmjax.devices.mesh", "LAYOUTS"))] = "dp"
    """Axes to split over. The first takes every device that the others leave over; the others have 2, unless given."""
    slices: PositiveInt | None = None
    """Groups of devices joined by a data-centre network alone (TPU slices); each has copies of the weights."""
    data: PositiveInt | None = None
    """Copies of the model."""
    pipeline: PositiveInt | None = None
    """Stages that the layers are spread over."""
    fsdp: PositiveInt | None = None
    """Devices that share one copy of the weights."""
    expert: PositiveInt | None = None
    """Devices that share the experts."""
    context: PositiveInt | None = None
    """Devices that share the tokens of one row, and the weights."""
    tensor: PositiveInt | None = None
    """Devices that share the heads and mlp columns of one layer."""
