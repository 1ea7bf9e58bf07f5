"""The run of the frozen work directories in tests/fixtures, as small as one can be; paths are relative.

Command     cd tests/fixtures/NAME && lmjax train --config=../../faults/frozen.py --workdir=run
"""

from ml_collections import ConfigDict

from lmjax.cells import Overrides
from lmjax.config import as_config_dict, default_config
from lmjax.data.config import PrepareConfig, SourceConfig, TokenizerConfig


def get_config() -> ConfigDict:
    config = default_config()
    recipe = PrepareConfig(
        inputs=("text/*.txt",), tokenizer=TokenizerConfig(kind="chars"), valid_fraction=0.2, shard_tokens=3000
    )
    config.data.sources = {"own": as_config_dict(SourceConfig(path="data", prepare=recipe))}
    config.data.seq_len = 16
    config.model.layers, config.model.embed, config.model.heads, config.model.mlp = 1, 8, 2, 16
    config.optimizer.schedule.warmup = 5
    config.train.steps, config.train.batch, config.train.log_every, config.train.evaluate_every = 12, 4, 1, 4
    config.train.sample.prompts = ()
    config.checkpoint.every, config.checkpoint.keep_last = 4, 1
    return config


def sweep() -> list[Overrides]:
    """`python -m launch sweep ../../faults/frozen.py --out=sweep`, of which one cell is trained."""
    short = {"train.steps": 4, "optimizer.schedule.warmup": 1, "train.evaluate_every": 4}
    return [{**short, "optimizer.learning_rate": rate} for rate in (1e-3, 3e-3)]
