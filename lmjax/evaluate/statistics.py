"""How certain a number is, and the difference between two: items are the sampled units, pairs stay pairs.

Every number is a ratio of two sums over items, y / weight: the mean of a score where all weights are 1, nats per token
or bits per byte where they are sizes.
"""

import math
from collections.abc import Sequence
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
    """One model less another on the same items, with the 95% interval of normal theory."""

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
    if np.all(weight_B == 1) and np.all((y_B == 0) | (y_B == 1)):
        return Estimate(value, stderr, *wilson(value, len(y_B)), len(y_B))
    return of_normal_theory(value, stderr, len(y_B))


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
    paired t-test, linearized as in `ratio_stderr`.
    """
    assert len(first[0]) == len(second[0]), "not the same items"
    value = float(first[0].sum() / first[1].sum() - second[0].sum() / second[1].sum())
    stderr = _stderr_of_sum(_residual(*first) - _residual(*second))
    return _with_interval(value, stderr, len(first[0]))


def _residual(y_B: np.ndarray, weight_B: np.ndarray) -> np.ndarray:
    """What each item adds to the ratio beyond its share."""
    return (y_B - y_B.sum() / weight_B.sum() * weight_B) / weight_B.sum()


def _stderr_of_sum(x_B: np.ndarray) -> float:
    n = len(x_B)
    return float(np.sqrt(n / (n - 1) * np.sum(x_B**2))) if n > 1 else math.nan


def _with_interval(value: float, stderr: float, items: int) -> Difference:
    return Difference(value, stderr, value - Z_95 * stderr, value + Z_95 * stderr, items)


def macro(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over categories, which count the same however many items they have."""
    value, stderr = _mean([one.value for one in estimates], [one.stderr for one in estimates])
    return of_normal_theory(value, stderr, sum(one.items for one in estimates))


def macro_difference(differences: Sequence[Difference]) -> Difference:
    """As `macro`."""
    value, stderr = _mean([one.value for one in differences], [one.stderr for one in differences])
    return _with_interval(value, stderr, sum(one.items for one in differences))


def _mean(values: Sequence[float], stderrs: Sequence[float]) -> tuple[float, float]:
    return math.fsum(values) / len(values), math.sqrt(sum(x**2 for x in stderrs)) / len(values)


def mcnemar(first_B: np.ndarray, second_B: np.ndarray) -> McNemar:
    """The exact test of McNemar (1947) for two models' rights and wrongs on the same items, two-sided.

    Of the items that one model alone gets right each is a fair coin if both are equally good. Exact tests of so few
    outcomes are conservative: p <= 0.05 happens in less than 5% of such comparisons.
    """
    b, c = int(np.sum((first_B > 0) & (second_B == 0))), int(np.sum((first_B == 0) & (second_B > 0)))
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return McNemar(b, c, min(1.0, 2 * tail / (1 << (b + c))))
