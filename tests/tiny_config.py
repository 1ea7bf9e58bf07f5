"""A run of seconds that uses what can go wrong on resume: dropout, accumulation, two sources, evaluation, samples.

Command     lmjax train --config=tests/tiny_config.py:DIR --workdir=DIR/run, with text in DIR/a and DIR/b
"""

from ml_collections import ConfigDict

from lmjax.config import as_config_dict, default_config
from lmjax.data.config import PrepareConfig, SourceConfig, TokenizerConfig


def get_config(directory: str) -> ConfigDict:
    config = default_config()
    config.data.sources = {
        name: as_config_dict(
            SourceConfig(
                path=f"{directory}/{name}.prepared",
                weight=weight,
                prepare=PrepareConfig(
                    inputs=(f"{directory}/{name}/*.txt",), tokenizer=TokenizerConfig(kind="bytes"), valid_fraction=0.2
                ),
            )
        )
        for name, weight in (("a", 3.0), ("b", 1.0))
    }
    config.data.seq_len = 32
    config.model.layers, config.model.embed, config.model.heads, config.model.mlp = 2, 32, 2, 64
    config.model.dropout = 0.1
    config.optimizer.schedule.warmup = 5
    config.train.steps = 60
    config.train.batch = 8
    config.train.microbatches = 2
    config.train.log_every = 1
    config.train.evaluate_every = 15
    config.train.sample.tokens = 16
    config.checkpoint.every = 10
    return config
