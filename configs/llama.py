r"""Llama-style decoders: RMSNorm, rotary positions, SwiGLU, grouped queries.

Reproduces  the shapes of Llama 3.2 1B and 3B and Llama 3.1 8B and 70B with their vocabulary of 128,256 (1,235,814,400,
            3,212,749,824, 8,030,261,248 and 70,553,706,496 parameters); 60m, 150m and 300m are small models of the same
            kind for sweeps, with the data set's own vocabulary. Steps give 20 tokens per parameter (Hoffmann et al.
            2022). Weights are split over all devices.
Costs       6 N D FLOPs: 60m 4e17, 150m 2.7e18, 300m 1.1e19, 1b 1.8e20, 3b 1.2e21, 8b 7.7e21, 70b 6e23.
Command     lmjax train --config=configs/llama.py:150m --workdir=gs://bucket/llama-150m \
                --config.data.sources.text.path=gs://bucket/tokens
"""

from ml_collections import ConfigDict

from lmjax.config import as_config_dict, default_config
from lmjax.data.config import SourceConfig
from lmjax.errors import ConfigError

# layers, embed, heads, kv_heads, head_dim, mlp, parameters (for 20 tokens each)
SIZES = {
    "60m": (8, 512, 8, 8, 64, 1536, 60e6),
    "150m": (12, 768, 12, 12, 64, 2048, 150e6),
    "300m": (24, 1024, 16, 16, 64, 2816, 300e6),
    "1b": (16, 2048, 32, 8, 64, 8192, 1.236e9),
    "3b": (28, 3072, 24, 8, 128, 8192, 3.213e9),
    "8b": (32, 4096, 32, 8, 128, 14336, 8.03e9),
    "70b": (80, 8192, 64, 8, 128, 28672, 70.55e9),
}
PUBLISHED = ("1b", "3b", "8b", "70b")


def get_config(size: str = "150m") -> ConfigDict:
    if size not in SIZES:
        raise ConfigError(f"llama.py:{size}: the sizes are {', '.join(SIZES)}")
    layers, embed, heads, kv_heads, head_dim, mlp, parameters = SIZES[size]
    published = size in PUBLISHED
    config = default_config()
    config.data.sources = {"text": as_config_dict(SourceConfig(path="data/llama"))}
    config.data.seq_len = 8192 if published else 2048

    config.model.vocab = 128_256 if published else None
    config.model.context = config.data.seq_len
    config.model.layers, config.model.embed, config.model.mlp = layers, embed, mlp
    config.model.heads, config.model.kv_heads, config.model.head_dim = heads, kv_heads, head_dim
    config.model.activation, config.model.gated = "silu", True
    config.model.norm_epsilon = 1e-5
    config.model.tied = size in ("1b", "3b")
    if published:
        config.model.rope.theta = 500_000.0
        config.model.rope.scaling = "llama3"
        config.model.rope.factor = 32.0 if size in ("1b", "3b") else 8.0
    config.model.dtype = "bfloat16"
    config.model.remat = "full" if published else "dots"

    config.optimizer.learning_rate = 3e-4 if published else 1e-3
    config.optimizer.schedule.warmup = 500
    tokens_per_step = 2**21 if published else 2**20
    config.train.batch = tokens_per_step // config.data.seq_len
    config.train.steps = round(20 * parameters / tokens_per_step)
    config.train.evaluate_every = 1000
    config.train.evaluate_batches = 8
    config.train.evaluate_batch = config.train.batch
    config.train.loss.chunk = 512
    config.mesh.layout = "fsdp"
    return config
