"""The mixers that `model.pattern` names. A new one is a file with its five parts (layer_inputs.py) and a line here."""

from lmjax.models.attention.mixer import ATTENTION
from lmjax.models.layer_inputs import Mixer

MIXERS: dict[str, Mixer] = {
    "global": ATTENTION,
    "local": ATTENTION,
}
