"""A language model learns to follow instructions by trained embeddings in front of every text: a soft prompt.

Reproduces  nothing published: the lessons and settings of configs/tune/instruct.py, and a soft prompt (Lester et al.
            2021, arXiv:2104.08691) of 20 places. All weights are frozen, in bfloat16. A prompt learns slowly: its rate
            is a hundred times that of the weights (docs/tuning.md).
Costs       the FLOPs of configs/tune/instruct.py less those of the gradients of what is frozen; --dry-run says them.
Command     lmjax train --config=configs/tune/prompt.py:runs/base --workdir=runs/prompt
            with runs/base the work directory of a trained model; without one it stands on weights as they are drawn.
            Keys and values of each layer in place of embeddings: --config.tune.adapter.name=prefix
            All about it: docs/tuning.md
"""

from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict

from lmjax.config import as_config_dict
from lmjax.train.config import AdapterConfig


def get_config(base: str = "") -> ConfigDict:
    config: ConfigDict = run_path(str(Path(__file__).with_name("instruct.py")))["get_config"](base)
    config.tune.adapter = as_config_dict(AdapterConfig(name="prompt", length=20))
    config.tune.store = "bfloat16"
    config.optimizer.learning_rate = 0.3
    return config
