"""Shapes of plain decoders for a sweep: sizes that fill TPU tiles, with the proportions of usual decoders.

Plain Python: sweeps are planned without JAX.
"""

import math
from dataclasses import dataclass

LANE = 128  # TPU tiles and MXU columns: every large axis is a multiple of this
HEAD_DIM = 128
MLP_RATIO = 4
ASPECTS = (128, 96, 64)  # embed / layers of usual decoders
MAX_EMBED = 16384


@dataclass(frozen=True)
class Shape:
    """A plain decoder: attention 4 D^2 and an ungated MLP 8 D^2 a layer, so N = 12 L D^2 without embeddings."""

    layers: int
    embed: int

    @property
    def params(self) -> float:
        return 12.0 * self.layers * self.embed**2

    def settings(self, sequence: int) -> dict[str, object]:
        """What a config sets to have this shape, for rows of `sequence` tokens."""
        return {
            "model.layers": self.layers,
            "model.embed": self.embed,
            "model.heads": max(1, self.embed // HEAD_DIM),
            "model.mlp": MLP_RATIO * self.embed,
            "model.gated": False,
            "model.context": sequence,
            "data.seq_len": sequence,
        }


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


def nearest_shape(params: float) -> Shape:
    """The shape whose N is closest to `params` in ratio."""
    return min(shapes(1.0, math.inf), key=lambda shape: abs(math.log(shape.params / params)))
