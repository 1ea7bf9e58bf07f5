"""A language model learns to follow instructions through small matrices beside its own: LoRA.

Reproduces  nothing published: the lessons and settings of configs/tune/instruct.py, and LoRA (Hu et al. 2021,
            arXiv:2106.09685) of rank 8 on every matrix of every layer. What it stands on is frozen, in bfloat16.
Costs       the FLOPs of configs/tune/instruct.py less those of the gradients of what is frozen; --dry-run says them.
Command     lmjax train --config=configs/tune/lora.py:runs/base --workdir=runs/lora
            with runs/base the work directory of a trained model; without one it stands on weights as they are drawn.
            All about it: docs/tuning.md
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict

from lmjax.config import as_config_dict
from lmjax.train.config import AdapterConfig


def get_config(base: str = "") -> ConfigDict:
    config: ConfigDict = run_path(str(Path(__file__).with_name("instruct.py")))["get_config"](base)
    config.tune.adapter = as_config_dict(AdapterConfig(rank=8, alpha=16.0))
    config.tune.store = "bfloat16"
    return config
