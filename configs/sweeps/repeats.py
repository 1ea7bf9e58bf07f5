r"""Unique tokens by epochs: what repeated data are worth.

Reproduces  the design of Muennighoff et al. (2023), figure 3, in small: models on 1 to 64 epochs of each of three
            amounts of unique text, all with the tokens of one epoch of the next amount among them, so that the same
            number of tokens is seen once, or several times. `analysis/repeats.py` fits the value of repetition.
Costs       21 runs, 7.6e19 FLOPs.
Command     python -m launch sweep configs/sweeps/repeats.py --out=gs://bucket/repeats --engine=gke \
                --accelerator=v5e-8 --config.data.sources.text.path=gs://bucket/tokens
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from lmjax.cells import Overrides
from lmjax.config import as_config_dict, default_config
from lmjax.data.config import SourceConfig
from lmjax.models.shapes import nearest_shape
from lmjax.optim.hyperparameters import porian_batch, rows, updates

SEQ_LEN, VOCAB = 2048, 32_768
UNIQUE = (50_000_000, 200_000_000, 800_000_000)  # tokens
EPOCHS = (1, 2, 4, 8, 16, 32, 64)
PARAMS = 60e6


def get_config() -> ConfigDict:
    config = default_config()
    config.data.sources = {"text": as_config_dict(SourceConfig(path="data/sweep"))}
    config.data.seq_len = SEQ_LEN
    config.model.vocab = VOCAB
    config.model.dtype = "bfloat16"
    config.hyperparameters = "porian"
    config.train.evaluate_batches = 8
    config.train.sample.prompts = ()
    config.mesh.layout = "fsdp"
    return config


def sweep() -> Iterable[Overrides]:
    shape = nearest_shape(PARAMS)
    params = shape.params + VOCAB * shape.embed
    batch = rows(porian_batch(params), SEQ_LEN)
    for unique in UNIQUE:
        for epochs in EPOCHS:
            steps = updates(unique * epochs, batch * SEQ_LEN)
            yield {
                "tracking.name": f"{unique / 1e6:.0f}M-x{epochs}",
                **shape.settings(SEQ_LEN),
                "data.sources.text.tokens": unique,
                "train.batch": batch,
                "train.steps": steps,
                "optimizer.schedule.warmup": max(1, min(round(params / (batch * SEQ_LEN)), steps // 10)),
            }
