"""How certain a number is, and the difference between two: items are the sampled units, pairs stay pairs.

Every number is a ratio of two sums over items, y / weight: the mean of a score where all weights are 1, nats per token
or bits per byte where they are sizes.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

Z_95 = 1.959963984540054
"""The standard normal's 97.5th percentile."""


class Estimate(NamedTuple):
    """A number with its standard error and 95% interval; these are nan where a single item gives none."""

    value: float
    stderr: float
    low: float
    high: float
    items: int


class Difference(NamedTuple):
    """One model less another on the same items, with its standard error and 95% interval."""

    value: float
    stderr: float
    low: float
    high: float
    items: int


class McNemar(NamedTuple):
    """Items that one model alone gets right, and how likely so uneven a split is if both are equally good."""

    first_only: int
    second_only: int
    p: float


def estimate(y_B: np.ndarray, weight_B: np.ndarray) -> Estimate:
    """sum(y) / sum(weight). Its interval is that of normal theory; of a share, where every item is 0 or 1, Wilson's."""
    value, stderr = float(y_B.sum() / weight_B.sum()), ratio_stderr(y_B, weight_B)
    if _is_share(y_B, weight_B):
        return Estimate(value, stderr, *wilson(value, len(y_B)), len(y_B))
    return of_normal_theory(value, stderr, len(y_B))


def _is_share(y_B: np.ndarray, weight_B: np.ndarray) -> bool:
    return bool(np.all(weight_B == 1) and np.all((y_B == 0) | (y_B == 1)))


def of_normal_theory(value: float, stderr: float, items: int) -> Estimate:
    return Estimate(value, stderr, value - Z_95 * stderr, value + Z_95 * stderr, items)


def wilson(share: float, items: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209): all shares from which this one is less
    than 1.96 of their own standard errors away. Unlike value +- 1.96 stderr it says something of none and of all."""
    shrink = 1 + Z_95**2 / items
    centre = (share + Z_95**2 / (2 * items)) / shrink
    half = Z_95 * math.sqrt(share * (1 - share) / items + Z_95**2 / (4 * items**2)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def ratio_stderr(y_B: np.ndarray, weight_B: np.ndarray) -> float:
    """Standard error of sum(y) / sum(weight) with whole rows as the sampled units; nan for a single row.

    Tokens of one window are alike, so they do not count as independent draws: this is the linearized variance of a
    ratio of two sums over clusters (Cochran 1977, Sampling Techniques, eq. 6.13), n/(n-1) sum (y - R weight)^2 /
    (sum weight)^2. It remains too small where neighbouring windows share a document.
    """
    return _stderr_of_sum(_residual(y_B, weight_B))


def difference(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> Difference:
    """The ratio of `first`, a (y_B, weight_B), less that of `second`, whose items are the same in the same order.

    What makes an item hard for both models cancels: the standard error is that of the difference item by item, as in a
    paired t-test, linearized as in `ratio_stderr`. The interval is that of normal theory; of two shares, Tango's.
    """
    assert len(first[0]) == len(second[0]), "not the same items"
    n = len(first[0])
    value = float(first[0].sum() / first[1].sum() - second[0].sum() / second[1].sum())
    stderr = _stderr_of_sum(_residual(*first) - _residual(*second))
    if _is_share(*first) and _is_share(*second):
        return Difference(value, stderr, *tango(*_alone(first[0], second[0]), n), n)
    return Difference(value, stderr, value - Z_95 * stderr, value + Z_95 * stderr, n)


def tango(first_only: int, second_only: int, items: int) -> tuple[float, float]:
    """The 95% interval of a difference of two shares of the same items (Tango 1998, Statist. Med. 17, pp. 891-908), by
    how many items are in the one alone and in the other alone.

    As Wilson's: all differences from which this one is less than 1.96 of their own standard errors away. It says
    something of models that never disagree, too.
    """
    return -_farthest_above(second_only, first_only, items), _farthest_above(first_only, second_only, items)


def _farthest_above(b: int, c: int, n: int) -> float:
    """The greatest difference that b and c are less than 1.96 standard errors below, by bisection."""
    low, high = (b - c) / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        # The likeliest share of c where the difference is `middle`: the greater root of 2n q^2 + linear q + constant.
        linear, constant = (2 * n - b + c) * middle - b - c, -c * middle * (1 - middle)
        q = (math.sqrt(max(0.0, linear**2 - 8 * n * constant)) - linear) / (4 * n)
        is_near = n * middle - b + c < Z_95 * math.sqrt(n * (2 * q + middle * (1 - middle)))
        low, high = (middle, high) if is_near else (low, middle)
    return high


def _residual(y_B: np.ndarray, weight_B: np.ndarray) -> np.ndarray:
    """What each item adds to the ratio beyond its share."""
    return (y_B - y_B.sum() / weight_B.sum() * weight_B) / weight_B.sum()


def _stderr_of_sum(x_B: np.ndarray) -> float:
    n = len(x_B)
    return float(np.sqrt(n / (n - 1) * np.sum(x_B**2))) if n > 1 else math.nan


def macro(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over categories, which count the same however many items they have.

    Its interval is made of theirs, its distances from the mean as if they were standard errors (Zou & Donner 2008,
    Statist. Med. 27, pp. 1693-1702): the same as that of normal theory where theirs are.
    """
    return Estimate(*_mean(estimates), sum(one.items for one in estimates))


def macro_difference(differences: Sequence[Difference]) -> Difference:
    """As `macro`."""
    return Difference(*_mean(differences), sum(one.items for one in differences))


def _mean(ones: Sequence[Estimate] | Sequence[Difference]) -> tuple[float, float, float, float]:
    """(value, stderr, low, high) of the mean of independent numbers."""

    def together(distances: Iterable[float]) -> float:
        return math.sqrt(sum(x**2 for x in distances)) / len(ones)

    value = math.fsum(one.value for one in ones) / len(ones)
    below, above = together(one.value - one.low for one in ones), together(one.high - one.value for one in ones)
    return value, together(one.stderr for one in ones), value - below, value + above


def _alone(first_B: np.ndarray, second_B: np.ndarray) -> tuple[int, int]:
    """How many items the first alone gets right, and how many the second."""
    return int(np.sum((first_B > 0) & (second_B == 0))), int(np.sum((first_B == 0) & (second_B > 0)))


def mcnemar(first_B: np.ndarray, second_B: np.ndarray) -> McNemar:
    """The exact test of McNemar (1947) for two models' rights and wrongs on the same items, two-sided.

    Of the items that one model alone gets right each is a fair coin if both are equally good. Exact tests of so few
    outcomes are conservative: p <= 0.05 happens in less than 5% of such comparisons.
    """
    b, c = _alone(first_B, second_B)
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return McNemar(b, c, min(1.0, 2 * tail / (1 << (b + c))))
