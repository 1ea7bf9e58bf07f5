r"""A grid of learning rates and batches at several sizes and token counts: hyperparameter laws of your own.

Reproduces  the design of Step Law (Li et al. 2025) in small: 5 learning rates by 4 batches at each of 3 sizes and 2
            token counts, decayed to the same final rate. `python -m analysis report` fits the laws of both and writes
            law.json, which `--config.hyperparameters=report/law.json` then applies.
Costs       120 runs, 3.2e20 FLOPs.
Command     python -m launch sweep configs/sweeps/learning_rate_batch.py --out=gs://bucket/rates --engine=gke \
                --accelerator=v5e-16 --config.data.sources.text.path=gs://bucket/tokens
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from lmjax.cells import Overrides
from lmjax.config import as_config_dict, default_config
from lmjax.data.config import SourceConfig
from lmjax.models.shapes import nearest_shape

SEQ_LEN, WARMUP_SHARE = 2048, 0.05
SIZES, TOKENS_PER_PARAMETER = (30e6, 60e6, 120e6), (20, 60)
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
BATCHES = (64, 128, 256, 512)  # sequences


def get_config() -> ConfigDict:
    config = default_config()
    config.data.sources = {"text": as_config_dict(SourceConfig(path="data/sweep"))}
    config.data.seq_len = config.model.context = SEQ_LEN
    config.model.vocab = 32_768
    config.model.dtype = "bfloat16"
    config.train.evaluate_batches = 8
    config.train.sample.prompts = ()
    config.mesh.layout = "fsdp"
    return config


def sweep() -> Iterable[Overrides]:
    for params in SIZES:
        shape = nearest_shape(params)
        for ratio in TOKENS_PER_PARAMETER:
            for batch in BATCHES:
                steps = round(ratio * shape.params / (batch * SEQ_LEN))
                for rate in RATES:
                    yield {
                        "tracking.name": f"{shape.params / 1e6:.0f}M-{ratio}x-b{batch}-lr{rate:g}",
                        **shape.settings(SEQ_LEN),
                        "train.batch": batch,
                        "train.steps": steps,
                        "optimizer.learning_rate": rate,
                        "optimizer.schedule.warmup": max(1, round(WARMUP_SHARE * steps)),
                        "optimizer.schedule.final_fraction": 1e-5 / rate,
                    }
