"""Learning rates at several widths, under the maximal update parametrization: does the best one stay where it is?

Reproduces  the figure of Yang et al. (2022) that made muP known, loss over learning rate at each width, for small
            decoders of the source code of Python's own standard library. The argument is the parametrization:
            `standard` shows what moves without it.
Costs       15 runs, 6.9e12 FLOPs: some minutes on 2 CPU cores of 2024.
Command     python -m launch sweep configs/sweeps/widths.py:mup --out=sweeps/widths
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from lmjax.cells import Overrides
from lmjax.config import as_config_dict, default_config
from lmjax.data.config import PrepareConfig, SourceConfig, TokenizerConfig
from lmjax.errors import ConfigError

PARAMETRIZATIONS = ("mup", "standard")
BASE, HEAD_DIM, LAYERS = 64, 32, 2
WIDTHS = (64, 128, 256)
RATES = (2**-10, 2**-9, 2**-8, 2**-7, 2**-6)


def get_config(parametrization: str) -> ConfigDict:
    if parametrization not in PARAMETRIZATIONS:
        raise ConfigError(f"widths.py:{parametrization}: the parametrizations are {', '.join(PARAMETRIZATIONS)}")
    config = default_config()
    recipe = PrepareConfig(inputs=("stdlib:",), tokenizer=TokenizerConfig(kind="bytes"), seed=2)
    config.data.sources = {"stdlib": as_config_dict(SourceConfig(path="data/stdlib-bytes", prepare=recipe))}
    config.data.seq_len = 64

    config.model.layers = LAYERS
    config.model.embed, config.model.heads, config.model.mlp = BASE, BASE // HEAD_DIM, 4 * BASE
    if parametrization != "standard":
        config.model.parametrization = parametrization
        config.model.base.embed, config.model.base.layers = BASE, LAYERS

    config.optimizer.schedule.name = "linear"
    config.optimizer.schedule.warmup = 20
    config.optimizer.schedule.final_fraction = 0.0
    config.train.steps = 200
    config.train.batch = 8
    config.train.evaluate_batches = 64
    config.train.sample.prompts = ()
    config.checkpoint.every = None
    return config


def sweep(parametrization: str) -> Iterable[Overrides]:
    for width in WIDTHS:
        for rate in RATES:
            yield {
                "tracking.name": f"{parametrization}-d{width}-lr{rate:.4g}",
                "model.embed": width,
                "model.heads": width // HEAD_DIM,
                "model.mlp": 4 * width,
                "optimizer.learning_rate": rate,
            }
