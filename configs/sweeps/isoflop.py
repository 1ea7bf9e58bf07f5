r"""IsoFLOP curves of plain decoders: approach 2 of Hoffmann et al. (2022), with hyperparameters by a published rule.

Reproduces  the design of Hoffmann et al. (2022), figure 3: models of different sizes at each of several budgets, here
            seven sizes within a factor 4 of 20 tokens per parameter. Learning rate, batch and schedule follow the rule
            `porian` (Porian et al. 2024), which was tuned for just this question.
Costs       small, five budgets from 1e17 to 1e19: 1e20 FLOPs; hoffmann, his nine from 6e18 to 3e21: 4e22. FLOPs are
            exact ones, head and causal attention included.
Command     python -m launch sweep configs/sweeps/isoflop.py:small --out=gs://bucket/isoflop --engine=gke \
                --accelerator=v5e-8 --config.data.sources.text.path=gs://bucket/tokens
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from lmjax.cells import Overrides
from lmjax.config import as_config_dict, default_config
from lmjax.data.config import SourceConfig
from lmjax.errors import ConfigError
from lmjax.models.shapes import Shape, nearest_shape
from lmjax.optim.hyperparameters import porian_batch, rows, updates

VOCAB, SEQ_LEN, TOKENS_PER_PARAMETER = 32_768, 2048, 20
SPAN, SIZES = 4.0, 7
MOST_WARMUP = 10  # of the largest models warmup over N tokens would be most of the run
BUDGETS = {"small": (1e17, 1e19, 5), "hoffmann": (6e18, 3e21, 9)}


def get_config(scale: str = "small") -> ConfigDict:
    if scale not in BUDGETS:
        raise ConfigError(f"isoflop.py:{scale}: the scales are {', '.join(BUDGETS)}")
    config = default_config()
    config.data.sources = {"text": as_config_dict(SourceConfig(path="data/sweep"))}
    config.data.seq_len = config.model.context = SEQ_LEN
    config.model.vocab = VOCAB
    config.model.dtype = "bfloat16"
    config.hyperparameters = "porian"
    config.train.evaluate_batches = 8
    config.train.sample.prompts = ()
    config.mesh.layout = "fsdp"
    return config


def sweep(scale: str = "small") -> Iterable[Overrides]:
    low, high, count = BUDGETS[scale]
    for step in range(count):
        budget = low * (high / low) ** (step / (count - 1))
        centre = (budget / (6 * TOKENS_PER_PARAMETER)) ** 0.5
        sizes = [centre * SPAN ** (2 * place / (SIZES - 1) - 1) for place in range(SIZES)]
        for shape in dict.fromkeys(map(nearest_shape, sizes)):  # two sizes may have the same nearest shape
            params = shape.params + VOCAB * shape.embed
            batch = rows(porian_batch(params), SEQ_LEN)
            steps = updates(budget / flops_per_token(shape), batch * SEQ_LEN)
            warmup = min(round(params / (batch * SEQ_LEN)), steps // MOST_WARMUP)
            yield {
                "tracking.name": f"{budget:.1e}-d{shape.embed}-l{shape.layers}",
                **shape.settings(SEQ_LEN),
                "train.batch": batch,
                "train.steps": steps,
                "optimizer.schedule.warmup": max(1, warmup),
            }


def flops_per_token(shape: Shape) -> float:
    """Forward and backward: 6 for each weight of a matmul, the head included, and for each pair of causal attention."""
    return 6 * (shape.params + VOCAB * shape.embed + shape.layers * SEQ_LEN * shape.embed)
