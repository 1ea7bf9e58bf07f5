r"""GPT-2 (Radford et al. 2019) in its four sizes, trained as nanoGPT trains it.

Reproduces  the architecture exactly (124,439,808 parameters for 124m; the table is padded from 50,257 rows by your
            tokenizer's own size). nanoGPT reports 2.85 nats on OpenWebText's validation set for 124m after 300B tokens.
Costs       124m on 9B tokens: 7e18 FLOPs.
Command     lmjax train --config=configs/gpt2.py:124m --workdir=gs://bucket/gpt2 --config.mesh.fsdp=8 \
                --config.data.sources.text.path=gs://bucket/openwebtext
"""

from ml_collections import ConfigDict

from lmjax.config import as_config_dict, default_config
from lmjax.data.config import SourceConfig
from lmjax.errors import ConfigError

SIZES = {"124m": (12, 768, 12), "350m": (24, 1024, 16), "774m": (36, 1280, 20), "1558m": (48, 1600, 25)}


def get_config(size: str = "124m") -> ConfigDict:
    if size not in SIZES:
        raise ConfigError(f"gpt2.py:{size}: the sizes are {', '.join(SIZES)}")
    config = default_config()
    config.data.sources = {"text": as_config_dict(SourceConfig(path="data/gpt2"))}
    config.data.seq_len = 1024

    config.model.vocab = 50_257
    config.model.context = 1024
    config.model.layers, config.model.embed, config.model.heads = SIZES[size]
    config.model.mlp = 4 * config.model.embed
    config.model.position = "learned"
    config.model.norm, config.model.norm_epsilon = "layer", 1e-5
    config.model.bias = True
    config.model.init_std = 0.02
    config.model.dtype = "bfloat16"

    config.optimizer.learning_rate = 6e-4
    config.optimizer.schedule.warmup = 700
    config.train.batch = 480
    config.train.steps = 18_865
    config.train.evaluate_every = 1000
    config.train.evaluate_batches = 100
    config.train.evaluate_batch = 96
    return config
