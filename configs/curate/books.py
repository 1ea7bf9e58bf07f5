"""Books and other long texts: repaired, each once, without what they share, and without private data.

Reproduces  nothing published; the rules against repetition are Gopher's.
Costs       docs/curation.md has the speed of each step; memory, some hundred megabytes for each process.
Command     lmjax curate configs/curate/books.py:my_text --out=data/books
            with my_text a folder, a file or a glob of .txt, .jsonl, .parquet or .html; then
            lmjax prepare data/books --out=data/books-tokens
"""

from ml_collections import ConfigDict

from lmjax.config import as_config_dict
from lmjax.data.curate.recipe import CurateConfig


def get_config(folder: str = "my_text") -> ConfigDict:
    steps = (
        {"step": "repair"},
        {"step": "normalize"},
        {"step": "privacy"},
        {"step": "repetition"},
        {"step": "held_out", "fraction": 0.02},
        {"step": "exact_duplicates"},
        {"step": "near_duplicates"},
        {"step": "repeated_parts", "part": "paragraph", "least_characters": 100, "most": 3, "keep_first": False},
    )
    return as_config_dict(CurateConfig(sources={"books": (folder,)}, steps=steps))
