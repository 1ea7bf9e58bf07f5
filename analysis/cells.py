"""Turn (N, D) into configs that a sweep can train: shapes that fill TPU tiles, batches that divide over a mesh."""

from dataclasses import dataclass

import numpy as np

LANE = 128  # TPU tiles and MXU columns: every large axis is a multiple of this
HEAD_DIM = 128
MLP_RATIO = 4
ASPECTS = (128, 96, 64)  # embed / layers of usual decoders
MAX_EMBED = 16384
SEQUENCE = 2048
FEWEST_STEPS = 200
WARMUP_SHARE = 0.02


@dataclass(frozen=True)
class Shape:
    """A plain decoder: attention 4 E^2 and an ungated MLP 8 E^2 a layer, so N = 12 L E^2 without embeddings."""

    layers: int
    embed: int

    @property
    def params(self) -> float:
        return 12.0 * self.layers * self.embed**2


def shapes(smallest: float, largest: float) -> list[Shape]:
    """Shapes of N between the two, by rising N; of two within 5% the one with the usual aspect (first) stays."""
    found: list[Shape] = []
    for aspect in reversed(ASPECTS):
        for embed in range(LANE, MAX_EMBED + 1, LANE):
            shape = Shape(max(2, round(embed / aspect)), embed)
            apart = all(abs(shape.params / other.params - 1.0) > 0.05 for other in found)
            if smallest <= shape.params <= largest and apart:
                found.append(shape)
    return sorted(found, key=lambda shape: shape.params)


def suggested_learning_rate(flops: float) -> float:
    """0.3118 C^-0.125 (DeepSeek LLM, arXiv 2401.02954, eq. 1), fitted from 1e17 to 2e19 FLOPs."""
    return 0.3118 * flops**-0.125


def suggested_batch_tokens(flops: float) -> float:
    """0.2920 C^0.3271 tokens (DeepSeek LLM, arXiv 2401.02954, eq. 1), fitted from 1e17 to 2e19 FLOPs."""
    return 0.2920 * flops**0.3271


def overrides(
    shape: Shape,
    tokens: float,
    *,
    learning_rate: float | None = None,
    batch_tokens: float | None = None,
    devices: int = 8,
    sequence: int = SEQUENCE,
) -> dict[str, object]:
    """Config overrides of one run: the shape, and batch and steps whose product is `tokens` to within a step.

    Learning rate and batch (tokens) follow the compute where they are not given. The batch is a power of two sequences
    on each of `devices`, and leaves at least 200 steps.
    """
    flops = 6.0 * shape.params * tokens
    wanted = min(batch_tokens or suggested_batch_tokens(flops), tokens / FEWEST_STEPS) / sequence
    batch = devices * max(1, 2 ** int(np.floor(np.log2(max(wanted / devices, 1.0)))))
    steps = max(1, round(tokens / (batch * sequence)))
    return {
        "model.layers": shape.layers,
        "model.embed": shape.embed,
        "model.heads": max(1, shape.embed // HEAD_DIM),
        "model.mlp": MLP_RATIO * shape.embed,
        "model.gated": False,
        "model.context": sequence,
        "data.seq_len": sequence,
        "train.batch": batch,
        "train.steps": steps,
        "optimizer.learning_rate": float(f"{learning_rate or suggested_learning_rate(flops):.3g}"),
        "optimizer.schedule.warmup": max(1, round(WARMUP_SHARE * steps)),
    }


def nearest_shape(params: float) -> Shape:
    """The shape whose N is closest to `params` in ratio."""
    return min(shapes(1.0, np.inf), key=lambda shape: abs(np.log(shape.params / params)))
