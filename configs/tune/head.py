"""A language model learns to follow instructions by its last matrix alone, all others frozen.

Reproduces  nothing published: the lessons and settings of configs/tune/instruct.py, with the weights trained that make
            logits: the head, or the table of embeddings where that is the head.
Costs       the FLOPs of configs/tune/instruct.py less those of the gradients of what is frozen; --dry-run says them.
Command     lmjax train --config=configs/tune/head.py:runs/base --workdir=runs/head
            with runs/base the work directory of a trained model; without one it stands on weights as they are drawn.
            All about it: docs/tuning.md
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict


def get_config(base: str = "") -> ConfigDict:
    config: ConfigDict = run_path(str(Path(__file__).with_name("instruct.py")))["get_config"](base)
    config.tune.train = ("embed" if config.model.tied else "unembed",)
    return config
