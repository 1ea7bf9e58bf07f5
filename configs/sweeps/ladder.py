r"""A ladder of sizes, each trained on several multiples of 20 tokens per parameter.

Reproduces  the design of the OLMo ladder (Bhagia et al. 2024): 190M to 1.3B parameters at 1, 2, 5 and 10 times the
            tokens of Hoffmann et al. (2022), for laws of loss in N and D, and of what loss does to downstream tasks.
            Hyperparameters follow the rule `olmo_ladder`.
Costs       16 runs, 4.7e21 FLOPs.
Command     python -m launch sweep configs/sweeps/ladder.py --out=gs://bucket/ladder --engine=gke \
                --accelerator=v5p-32 --config.data.sources.text.path=gs://bucket/tokens
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from lmjax.cells import Overrides
from lmjax.config import as_config_dict, default_config
from lmjax.data.config import SourceConfig

SEQ_LEN = 4096
# layers, width, heads -> parameters without embeddings
RUNGS = {(12, 768, 12): 190e6, (16, 1024, 16): 370e6, (16, 1536, 16): 760e6, (16, 2048, 16): 1.28e9}
MULTIPLES = (1, 2, 5, 10)


def get_config() -> ConfigDict:
    config = default_config()
    config.data.sources = {"text": as_config_dict(SourceConfig(path="data/sweep"))}
    config.data.seq_len = config.model.context = SEQ_LEN
    config.model.vocab = 100_352
    config.model.tied = False
    config.model.activation, config.model.gated = "silu", True
    config.model.qk_norm = True
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.hyperparameters = "olmo_ladder"
    config.train.evaluate_every = 1000
    config.train.evaluate_batches = 8
    config.train.sample.prompts = ()
    config.mesh.layout = "fsdp"
    return config


def sweep() -> Iterable[Overrides]:
    for (layers, width, heads), params in RUNGS.items():
        for multiple in MULTIPLES:
            yield {
                "tracking.name": f"{params / 1e6:.0f}M-{multiple}x",
                "model.layers": layers,
                "model.embed": width,
                "model.heads": heads,
                "model.mlp": 8 * width // 3 // 256 * 256,
                "train.tokens": round(20 * params * multiple),
            }
