"""Which source each sample comes from: by formula, so that any sample can be asked for, in proportion at every moment.

The weights become integer shares of a period. One period's order comes from Tijdeman's solution of the chairman
assignment problem (Discrete Mathematics 32, 1980), which keeps every source within less than 1 sample of its share of
the first n, for every n; then it repeats.
"""

import fractions
import functools
import heapq
import math
from collections.abc import Callable, Sequence

import numpy as np

MixtureRule = Callable[[Sequence[float], Sequence[int]], Sequence[float]]
"""(the sources' weights, their tokens) -> what each one's share of the samples is proportional to"""


def by_weight(weights: Sequence[float], tokens: Sequence[int]) -> Sequence[float]:
    return weights


def by_size(weights: Sequence[float], tokens: Sequence[int]) -> Sequence[float]:
    """A source of weight 1 is read as often as any other: shares follow its tokens."""
    return [weight * size for weight, size in zip(weights, tokens, strict=True)]


MIXTURES: dict[str, MixtureRule] = {
    "by_weight": by_weight,
    "by_size": by_size,
}

SHORTEST, LONGEST = 1 << 16, 1 << 20
_CLOSE = 1e-3  # how far, as a part of itself, rounding may take a share from its weight


class Mixture:
    """Sample -> (source, cursor), where a source's cursor counts the samples that were taken from it.

    `shares / period` are the weights, exactly if they are ratios of integers with a small sum (as 0.7 and 0.3 are). If
    not, they are rounded to a `resolution` of 2^16 to 2^20: the first that brings every share within 1/1000 of itself.
    From sample `origin` on, the order starts afresh with the given cursors, which is how a mixture is changed in
    mid-run.
    """

    def __init__(
        self,
        weights: Sequence[float],
        origin: int = 0,
        cursors: Sequence[int] | None = None,
        resolution: int | None = None,
    ):
        self.resolution = resolution or close_resolution(tuple(weights))
        self.shares = _shares(tuple(weights), self.resolution)
        self.period = sum(self.shares)
        self._origin = origin
        self._cursors = np.array(cursors if cursors is not None else [0] * len(weights), np.int64)
        self._order, self._rank = _balanced_order(self.shares)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source (an index) and the cursor in it, of each global sample index (int64, from `origin` on)."""
        if len(self.shares) == 1:
            return np.zeros_like(samples), self._cursors[0] + samples - self._origin
        periods, place = np.divmod(samples - self._origin, self.period)
        source = self._order[place]
        shares = np.array(self.shares, np.int64)[source]
        return source, self._cursors[source] + periods * shares + self._rank[place]

    def cursors(self, sample: int) -> list[int]:
        """How much of each source the samples before `sample` took, what the given cursors say included."""
        periods, place = divmod(sample - self._origin, self.period)
        taken = np.bincount(self._order[:place], minlength=len(self.shares))
        return (self._cursors + periods * np.array(self.shares, np.int64) + taken).tolist()


@functools.cache
def close_resolution(weights: tuple[float, ...]) -> int:
    """The shortest period, a power of 2, in which rounding takes no share further than 1/1000 of itself, or LONGEST."""
    exact = [fractions.Fraction(repr(float(weight))) for weight in weights]
    resolution = SHORTEST
    while resolution < LONGEST:
        shares = _shares(weights, resolution)
        worst = max(
            abs(share * sum(exact) / (weight * sum(shares)) - 1) for share, weight in zip(shares, exact, strict=True)
        )
        if worst <= _CLOSE:
            break
        resolution *= 2
    return resolution


def _shares(weights: tuple[float, ...], resolution: int) -> tuple[int, ...]:
    """Integers in the ratio of the weights: the smallest exact ones if their sum is small, else rounded ones."""
    exact = [fractions.Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    numbers = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*numbers)
    if sum(numbers) // divisor <= resolution:
        return tuple(number // divisor for number in numbers)
    ideal = [fractions.Fraction(number * resolution, sum(numbers)) for number in numbers]
    shares = [max(1, int(share)) for share in ideal]  # every source is read at last
    missing = resolution - sum(shares)
    by_remainder = sorted(range(len(ideal)), key=lambda index: (int(ideal[index]) - ideal[index], index))
    for index in by_remainder[: max(missing, 0)]:
        shares[index] += 1
    shares[shares.index(max(shares))] += min(missing, 0)
    return tuple(shares)


@functools.cache
def _balanced_order(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(the source of each sample, int32 [period]; how many samples of it came before in the period, int64 [period]).

    Of the sources that have earned a sample (their share so far exceeds what they had by 1/(2k - 2) or more, for k
    sources), the one goes next whose claim would first grow too large. When that is, and when a source has earned its
    next sample, depends on how many it had alone: so both wait in heaps.
    """
    period, slack = sum(shares), 2 * len(shares) - 2
    order, rank = np.zeros(period, np.int32), np.arange(period)
    if not slack:
        return order, rank

    def earned(source: int, had: int) -> tuple[int, int, int]:
        return -(-period * (slack * had + 1) // (slack * shares[source])) - 1, source, had

    waiting = [earned(source, 0) for source in range(len(shares))]
    heapq.heapify(waiting)
    ready: list[tuple[int, float, int, int]] = []
    for step in range(period):
        while waiting and waiting[0][0] <= step:
            _, source, had = heapq.heappop(waiting)
            # As a whole number and a rest: the rests of different times are too far apart to be rounded to one.
            whole, rest = divmod(period * (slack - 1 + slack * had), shares[source])
            heapq.heappush(ready, (whole, rest / shares[source], source, had))
        _, _, source, had = heapq.heappop(ready)
        order[step], rank[step] = source, had
        heapq.heappush(waiting, earned(source, had + 1))
    return order, rank
