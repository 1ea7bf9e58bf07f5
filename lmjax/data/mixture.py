"""Which source each sample comes from: by formula, so that any sample can be asked for, in proportion at every moment.

The weights become integer shares of a period. One period's order comes from Tijdeman's solution of the chairman
assignment problem (Discrete Mathematics 32, 1980), which keeps every source within less than 1 sample of its share of
the first n, for every n; then it repeats.
"""

import fractions
import functools
import math
from collections.abc import Sequence

import numpy as np

_LONGEST_PERIOD = 1 << 16


class Mixture:
    """Sample -> (source, cursor), where a source's cursor counts the samples that were taken from it.

    `shares / period` are the weights, exactly if they are ratios of integers with a small sum (as 0.7 and 0.3 are), to
    1/65536 otherwise. From sample `origin` on, the order starts afresh with the given cursors, which is how a mixture
    is changed in mid-run.
    """

    def __init__(self, weights: Sequence[float], origin: int = 0, cursors: Sequence[int] | None = None):
        self.shares = _shares(tuple(weights))
        self.period = sum(self.shares)
        self._origin = origin
        self._cursors = np.array(cursors if cursors is not None else [0] * len(weights), np.int64)
        self._order = _balanced_order(self.shares)
        taken = self._order[:, None] == np.arange(len(weights))
        self._taken_before = np.concatenate([np.zeros((1, len(weights)), np.int64), np.cumsum(taken, axis=0)])

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source (an index) and the cursor in it, of each global sample index (int64, from `origin` on)."""
        periods, place = np.divmod(samples - self._origin, self.period)
        source = self._order[place]
        shares = np.array(self.shares, np.int64)[source]
        return source, self._cursors[source] + periods * shares + self._taken_before[place, source]

    def cursors(self, sample: int) -> list[int]:
        """How much of each source the samples before `sample` took, what the given cursors say included."""
        periods, place = divmod(sample - self._origin, self.period)
        return (self._cursors + periods * np.array(self.shares, np.int64) + self._taken_before[place]).tolist()


def _shares(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Integers in the ratio of the weights: the smallest exact ones if their sum is small, else rounded ones."""
    exact = [fractions.Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    numbers = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*numbers)
    if sum(numbers) // divisor <= _LONGEST_PERIOD:
        return tuple(number // divisor for number in numbers)
    ideal = [fractions.Fraction(number * _LONGEST_PERIOD, sum(numbers)) for number in numbers]
    shares = [max(1, int(share)) for share in ideal]  # every source is read at last
    missing = _LONGEST_PERIOD - sum(shares)
    by_remainder = sorted(range(len(ideal)), key=lambda index: (int(ideal[index]) - ideal[index], index))
    for index in by_remainder[: max(missing, 0)]:
        shares[index] += 1
    shares[shares.index(max(shares))] += min(missing, 0)
    return tuple(shares)


@functools.cache
def _balanced_order(shares: tuple[int, ...]) -> np.ndarray:
    """int32 [period]: the source of each sample.

    Of the sources that have earned a sample (their share so far exceeds what they had by 1/(2k - 2) or more, for k
    sources), the one goes next whose claim would first grow too large.
    """
    period, slack = sum(shares), 2 * len(shares) - 2
    taken = [0] * len(shares)
    order = np.zeros(period, np.int32)
    if slack:
        for step in range(period):
            claims = [(share * (step + 1) - period * had) * slack for share, had in zip(shares, taken, strict=True)]
            deadlines = [
                ((slack - 1) * period - claim) / share if claim >= period else math.inf
                for claim, share in zip(claims, shares, strict=True)
            ]
            chosen = deadlines.index(min(deadlines))
            taken[chosen] += 1
            order[step] = chosen
    return order
