"""Source code: under permissive licences, written by people, each file once, without addresses.

Reproduces  the filters of The Stack v2 (Lozhkov et al., arXiv:2402.19173, section 2.1) but for those of single
            languages, and StarCoder's near duplicates (Li et al., arXiv:2305.06161, section 3), at 0.7 of runs of 5
            words. Private data are there found by a model, licences by ScanCode, also those of whole repositories.
Costs       docs/curation.md has the speed of each step.
Command     lmjax curate configs/curate/code.py:my_code --out=data/code
            with my_code a folder, a glob or `stdlib:`, the standard library of Python that runs it
"""

from ml_collections import ConfigDict

from lmjax.config import as_config_dict
from lmjax.data.curate.recipe import CurateConfig

SUFFIXES = (".c .cc .cpp .cs .go .h .hpp .java .jl .js .kt .lua .php .pl .rb .rs .scala .sh .sql .swift .ts").split()


def get_config(folder: str = "my_code") -> ConfigDict:
    steps = (
        {"step": "licence"},
        {"step": "code"},
        {"step": "privacy", "phones": "keep", "cards": "keep"},  # numbers in code are seldom either
        {"step": "held_out", "fraction": 0.02},
        {"step": "exact_duplicates", "normalized": False},
        {"step": "near_duplicates", "threshold": 0.7, "bands": 28, "rows": 5},
    )
    return as_config_dict(CurateConfig(sources={"code": (folder,)}, steps=steps, text_suffixes=tuple(SUFFIXES)))
