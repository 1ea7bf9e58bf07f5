"""A small model of Python code, from nothing: the first run on a new machine.

Reproduces  nothing published: it shows every part at work on a corpus that every machine already has, the source code
            of Python's own standard library, and beats xz -9e on text that it has not seen.
Costs       about 4 minutes on 2 CPU cores.
Command     lmjax train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from lmjax.config import as_config_dict, default_config
from lmjax.data.config import PrepareConfig, SourceConfig, TokenizerConfig


def get_config() -> ConfigDict:
    config = default_config()

    recipe = PrepareConfig(inputs=("stdlib:",), tokenizer=TokenizerConfig(kind="bpe", vocab=2048))
    config.data.sources = {"stdlib": as_config_dict(SourceConfig(path="data/stdlib", prepare=recipe))}
    config.data.seq_len = 256

    config.model.layers = 5
    config.model.embed = 128
    config.model.heads = 2
    config.model.mlp = 512
    config.model.activation = "relu_squared"
    config.model.unroll = 1.0

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 8e-3
    config.optimizer.schedule.warmup = 50
    config.optimizer.schedule.final_fraction = 0.0

    config.train.steps = 800
    config.train.batch = 8
    config.train.evaluate_every = 200
    config.train.evaluate_batches = 16
    config.train.evaluate_batch = 8
    config.train.compression_baseline = True
    config.train.sample.prompts = ("def", "class", "import")
    config.checkpoint.every = 200
    return config
