"""The mixers that `model.pattern` names. A new one is a file with its five parts (context.py) and a line here."""

from lmjax.models.attention.mixer import ATTENTION
from lmjax.models.context import Mixer

MIXERS: dict[str, Mixer] = {
    "global": ATTENTION,
    "local": ATTENTION,
}
