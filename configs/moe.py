"""A mixture of experts beside the dense model of equal FLOPs per token, on the quickstart's corpus, byte by byte.

Reproduces  what mixtures are for: at equal FLOPs per token and on the same samples the mixture reaches the lower
            validation loss. Its tokens pass through two of eight experts of 128 hidden units, chosen by a router of
            eight outputs; the dense mlp has 260 hidden units, four for what the router costs: docs/moe.md.
Costs       dense four, mixture six minutes on one CPU core that others share.
Command     lmjax train --config=configs/moe.py --workdir=runs/moe
            lmjax train --config=configs/moe.py:dense --workdir=runs/dense
"""

from ml_collections import ConfigDict

from lmjax.config import as_config_dict, default_config
from lmjax.data.config import PrepareConfig, SourceConfig, TokenizerConfig
from lmjax.errors import ConfigError


def get_config(arm: str = "moe") -> ConfigDict:
    if arm not in ARMS:
        raise ConfigError(f"moe.py:{arm}: the arms are {', '.join(ARMS)}")
    config = default_config()
    recipe = PrepareConfig(inputs=("stdlib:",), tokenizer=TokenizerConfig(kind="bytes"), seed=2)
    config.data.sources = {"stdlib": as_config_dict(SourceConfig(path="data/stdlib-bytes", prepare=recipe))}
    config.data.seq_len = 256

    # Small for its data and mostly mlp: capacity is what it lacks.
    config.model.layers = 4
    config.model.embed = 32
    config.model.heads = 1
    config.model.activation = "relu_squared"
    config.model.qk_norm = True
    config.model.residual_init_scale = 0.0
    ARMS[arm](config)

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-2
    config.optimizer.adam_rate = 2.0
    config.optimizer.schedule.warmup = 40
    config.optimizer.schedule.final_fraction = 0.0

    config.train.steps = 1000
    config.train.batch = 8
    config.train.evaluate_every = 100
    config.train.evaluate_batches = 16
    config.train.evaluate_batch = 8
    config.checkpoint.every = 500
    return config


def dense(config: ConfigDict) -> None:
    config.model.mlp = 260


def moe(config: ConfigDict) -> None:
    config.model.moe.experts = 8
    config.model.moe.top_k = 2
    config.model.moe.mlp = 128


ARMS = {"moe": moe, "dense": dense}
