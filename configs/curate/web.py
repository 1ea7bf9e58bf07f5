"""Pages of the web, in English: the main text of each, by the rules of Gopher, C4 and FineWeb.

Reproduces  the order of FineWeb's pipeline (Penedo et al., arXiv:2406.17557): extraction, language, Gopher's repetition
            and quality, C4's rules but that of terminal punctuation, its own rules, near duplicates, private data. Near
            duplicates are there found by 112 permutations at 0.75, languages by fastText at 0.65.
Costs       docs/curation.md has the speed of each step.
Command     lmjax curate configs/curate/web.py:pages --out=data/web
            with pages a folder of .html, or of .jsonl or .parquet with HTML or text
"""

from ml_collections import ConfigDict

from lmjax.config import as_config_dict
from lmjax.data.curate.recipe import CurateConfig


def get_config(folder: str = "pages") -> ConfigDict:
    steps = (
        {"step": "extract", "favor": "precision"},
        {"step": "language", "keep": ("en",), "least": 0.65},
        {"step": "repair"},
        {"step": "normalize"},
        {"step": "repetition"},
        {"step": "gopher"},
        {"step": "c4", "end_in_punctuation": False},
        {"step": "fineweb"},
        {"step": "held_out", "fraction": 0.005},
        {"step": "exact_duplicates"},
        {"step": "near_duplicates", "threshold": 0.75},
        {"step": "repeated_parts", "part": "line", "most": 10, "keep_first": False},
        {"step": "privacy"},
    )
    return as_config_dict(CurateConfig(sources={"web": (folder,)}, steps=steps))
