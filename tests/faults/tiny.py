"""The run that the tests of faults train: seconds, two sources, evaluations, a checkpoint every four of twelve steps.

Command     lmjax train --config=tests/faults/tiny.py:DIR --workdir=DIR/run, with text in DIR/a and DIR/b
"""

from ml_collections import ConfigDict

from tests import tiny_config


def get_config(directory: str) -> ConfigDict:
    config = tiny_config.get_config(directory)
    config.model.layers = 1
    config.train.steps, config.train.microbatches, config.train.evaluate_every = 12, 1, 6
    config.train.sample.prompts = ()
    config.checkpoint.every = 4
    return config
