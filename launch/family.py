"""The models that a growing sweep may train: a config file's own family, or plain decoders that fill TPU tiles.

A config file may have, beside `get_config`, two functions that take the same argument:

    shapes() -> Iterable[Overrides]                            its models, from small to large
    cell(shape: Overrides, tokens: float) -> Overrides         one of them, trained on so many tokens
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analysis.cells import overrides as plain_cell
from launch import price
from launch.price import Accelerator, Price
from lmjax.cells import Cell, Overrides, check_cells, texts
from lmjax.config import ConfigFile
from lmjax.errors import ConfigError
from lmjax.models.shapes import Shape, shapes

NOMINAL_TOKENS = 1e9
"""On which the sizes of a family are counted; they do not depend on it."""


class Member(NamedTuple):
    """One size."""

    params: int
    """That a token passes through: the N of 6ND."""
    shape: Overrides | Shape


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one config file, from small to large."""

    file: ConfigFile
    common: Sequence[str]
    on: Accelerator
    devices: int
    members: list[Member]

    def cells(self, wanted: Sequence[tuple[float, float]]) -> tuple[list[Cell], list[Price]]:
        """Checked and priced: for each (N, D) the member of the nearest N, trained on as many FLOPs."""
        cells = check_cells(self.file, [self._given(*pair) for pair in wanted], self.common)
        return cells, price.price_all(cells, self.on)

    def steps(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The updates of each pair of an N and a D, both (cells,)."""
        return np.array([self._steps(self._given(*pair)) for pair in zip(params, tokens, strict=True)], dtype=int)

    def _given(self, params: float, tokens: float) -> Overrides:
        member = self.nearest(params)
        return _cell(self.file, member.shape, params * tokens / member.params, self.devices)

    def _steps(self, given: Overrides) -> int:
        """As the cell says them, or else as the rule or `train.tokens` of its config does."""
        if "train.steps" in given:
            return given["train.steps"]
        try:
            return self.file.config([*self.common, *texts(given)]).train.steps
        except ConfigError:  # as of a warmup that is longer than so short a run
            return 0

    def nearest(self, params: float) -> Member:
        """In ratio. Raises ConfigError for an N far beyond the family."""
        member = min(self.members, key=lambda member: abs(math.log(member.params / params)))
        if not 0.5 < member.params / params < 2:
            low, high = self.members[0].params, self.members[-1].params
            raise ConfigError(
                f"N={params:.3g} lies outside this family of {low:,} to {high:,} parameters; add to shapes() in "
                f"{self.file.location}"
            )
        return member


def family(location: str, common: Sequence[str], on: Accelerator, smallest: float, largest: float) -> Family:
    """Its members of about `smallest` to `largest` parameters. Raises ConfigError for none, or shapes that do not fit.

    Plain decoders are those of a config file without shapes() of its own.
    """
    file, devices = ConfigFile(location), on.devices
    own = hasattr(file.module, "shapes") and hasattr(file.module, "cell")
    found: Sequence[Overrides | Shape] = list(file.call("shapes")) if own else shapes(smallest, largest)
    given = [_cell(file, shape, NOMINAL_TOKENS, devices) for shape in found]
    cells = check_cells(file, given, common)
    members = [
        Member(priced.counts.active, shape)
        for shape, priced in zip(found, price.price_all(cells, on), strict=True)
        if smallest <= priced.counts.active <= largest
    ]
    if not members:
        raise ConfigError(f"{location}: no shape has {smallest:.3g} to {largest:.3g} parameters")
    return Family(file, common, on, devices, sorted(members, key=lambda member: member.params))


def _cell(file: ConfigFile, shape: Overrides | Shape, tokens: float, devices: int) -> Overrides:
    if isinstance(shape, Shape):
        return plain_cell(shape, tokens, devices=devices)
    return file.module.cell(shape, tokens)
