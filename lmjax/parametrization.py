"""How initialization, gradients, learning rates and multipliers change with width and depth, by the declarations alone.

    standard   nothing changes: matrices start by their fan-in, all weights train at the same rate
    mup        the maximal update parametrization (Yang et al. 2022, arXiv:2203.03466, table 8), and in depth
               1 / sqrt(layers) (Yang et al. 2023, arXiv:2310.02244)
    completep  the same in width, and in depth 1 / layers (Dey et al. 2025, arXiv:2505.01618)

Every factor is over the base shape, `model.base`: a model of that shape is the standard one, to the program. From there
on the activations of every layer, and what an update changes of them, keep their size, and so does the best learning
rate. docs/mup.md has the table beside its sources, and what was measured.
"""

from collections.abc import Mapping
from typing import NamedTuple

from lmjax.errors import ConfigError
from lmjax.weights import UNSCALED, Scaling, Spec, Weight, by_path, map_with_path


class Depth(NamedTuple):
    """Powers of the number of layers over that of the base shape."""

    stream: float
    """The power of the factor on what a layer adds to the residual stream."""
    gradient: float
    """The power of the factor on the gradient of a weight in a layer, which becomes as much smaller."""
    rate: float
    """The power of the factor on the rate of a weight in a layer. With the stream's factor it leaves 1 / layers of a
    change to each."""


PARAMETRIZATIONS: dict[str, Depth | None] = {
    "standard": None,
    "mup": Depth(stream=-1 / 2, gradient=1 / 2, rate=-1 / 2),
    "completep": Depth(stream=-1, gradient=1, rate=0),
}
"""The powers of depth, by the names that `model.parametrization` takes. In width, mup and completep are both TABLE."""

LAYER_AXES = {"layers", "few_layers"}
"""A weight with one of these batch axes stands in a layer, between two additions to the residual stream."""


class Power(NamedTuple):
    """grown_in ** first * grown_out ** second"""

    grown_in: float = 0.0
    grown_out: float = 0.0

    def of(self, weight: Scaling) -> float:
        return weight.grown_in**self.grown_in * weight.grown_out**self.grown_out


class Row(NamedTuple):
    """What holds of one kind of weights; the names are those of Scaling."""

    std: Power
    gradient: Power
    rate: Power


TABLE: dict[str, Row] = {
    "input": Row(std=Power(), gradient=Power(0, 1), rate=Power()),
    "hidden": Row(std=Power(-1 / 2, 0), gradient=Power(0, 1), rate=Power(-1, 0)),
    "output": Row(std=Power(-1, 0), gradient=Power(), rate=Power(-1, 0)),
    "readout": Row(std=Power(), gradient=Power(1, 1), rate=Power()),
}
"""The parametrization in width: `scaling_kind` says which row a weight has.

The rate is that of optimizers whose steps do not depend on the gradient's size: AdamW, Lion, Adafactor, and Muon, whose
orthogonal step is brought to the size of theirs (optim/muon.py). SGD's is the product of gradient and rate. AdamW's eps
is compared with a gradient that has been scaled. What decay takes away is learning_rate * weight_decay at every width.
"""

LOGITS = Power(-1, -1)
"""What multiplies the logits, by the readout's sides, of which one grows."""


def scaling_kind(path: str, weight: Weight, scaling: Scaling) -> str:
    """The row of TABLE for a weight: of its sides, which grow, and what does it read and make?

    A table, scale or bias reads no width. A matrix between widths is hidden; the router of a mixture of experts, whose
    outputs do not grow, is an output; what makes logits is the readout, a tied table too, which both rows then fit.
    Raises ConfigError for a weight that none of them fits.
    """
    grows_in, grows_out = scaling.grown_in != 1, scaling.grown_out != 1
    if weight.kind in ("lookup", "scale", "bias") and grows_in:
        raise ConfigError(
            f"model.parametrization has no rule for '{path}' ({weight.kind}, {weight.axes}), of which the side that "
            "goes in grows; use model.parametrization=standard or declare it otherwise"
        )
    if weight.tied or (weight.kind == "matmul" and "vocab" in weight.out_axes):
        return "readout"
    if weight.kind == "matmul" and grows_in:
        return "hidden" if grows_out else "output"
    return "input"


def parametrize(name: str, spec: Spec, growth: Mapping[str, float], depth: float) -> Spec:
    """The spec with the scaling of every trainable weight.

    `growth` gives every axis its size over that of the base shape, `depth` is the number of layers over the base's.
    Raises ConfigError for a weight without a rule.
    """
    powers = PARAMETRIZATIONS[name]
    if powers is None:
        return spec
    layer = Scaling(gradient=depth**powers.gradient, rate=depth**powers.rate)
    return map_with_path(lambda path, weight: _scaled(path, weight, growth, layer), spec)


def _scaled(path: str, weight: Weight, growth: Mapping[str, float], layer: Scaling) -> Weight:
    """`layer` has the factors of weights in layers."""
    if not weight.trainable:
        return weight
    sides = Scaling(grown_in=_product(weight.in_axes, growth), grown_out=_product(weight.out_axes, growth))
    kind = scaling_kind(path, weight, sides)
    row, deep = TABLE[kind], layer if LAYER_AXES & {*weight.batch_axes} else UNSCALED
    return weight.scaled(
        sides._replace(
            kind=kind,
            std=row.std.of(sides),
            gradient=row.gradient.of(sides) * deep.gradient,
            rate=row.rate.of(sides) * deep.rate,
            logits=LOGITS.of(sides) if kind == "readout" else 1.0,
        )
    )


def _product(axes: tuple[str, ...], growth: Mapping[str, float]) -> float:
    product = 1.0
    for axis in axes:
        product *= growth[axis]
    return product


def stream_factor(name: str, depth: float) -> float:
    """What multiplies whatever a layer adds to the residual stream of a model `depth` times as deep as its base."""
    powers = PARAMETRIZATIONS[name]
    return 1.0 if powers is None else depth**powers.stream


def check_scaled(name: str, spec: Spec) -> None:
    """Raise ConfigError where a parametrization is asked for and a weight that is trained has none."""
    if PARAMETRIZATIONS[name] is None:
        return
    for path, weight in by_path(spec).items():
        if weight.trainable and weight.scaling.kind is None:
            raise ConfigError(
                f"model.parametrization={name} says nothing of '{path}' ({weight.axes}); use "
                "model.parametrization=standard, or let the model that declares it call parametrize"
            )
