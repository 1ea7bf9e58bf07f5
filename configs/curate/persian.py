"""Persian texts, verse among them: one spelling of yeh and kaf, and the zero width non-joiner where it belongs.

Reproduces  nothing published. Rules made for English are left out: stop words, marks at the ends of lines.
Costs       docs/curation.md has the speed of each step.
Command     lmjax curate configs/curate/persian.py:my_text --out=data/persian
"""

from ml_collections import ConfigDict

from lmjax.config import as_config_dict
from lmjax.data.curate.recipe import CurateConfig


def get_config(folder: str = "my_text") -> ConfigDict:
    steps = (
        {"step": "repair"},
        {"step": "normalize", "persian": True, "joiners": "tidy"},
        {"step": "language", "keep": ("fa",), "least": 0.5},
        {"step": "privacy"},
        {"step": "held_out", "fraction": 0.02},
        {"step": "exact_duplicates"},
        {"step": "near_duplicates"},
    )
    return as_config_dict(CurateConfig(sources={"persian": (folder,)}, steps=steps))
