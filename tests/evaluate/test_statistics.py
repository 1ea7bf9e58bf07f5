"""Standard errors, intervals and tests against simulation: what they promise is what happens."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from lmjax.evaluate.statistics import (
    Z_95,
    Difference,
    Estimate,
    difference,
    estimate,
    macro,
    macro_difference,
    mcnemar,
    of_normal_theory,
    ratio_stderr,
    wilson,
)

# One number -------------------------------------------------------------------------------------------------------


def test_standard_error_against_simulation() -> None:
    """Rows of unequal weight whose tokens are alike: the error is that of rows, not of tokens."""
    rng = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        weight_B = rng.integers(5, 30, size=60).astype(np.float64)
        level_B = rng.normal(3, 0.7, size=60)  # shared by the tokens of a row
        return weight_B * level_B + rng.normal(0, 1, size=60) * np.sqrt(weight_B), weight_B

    samples = [draw() for _ in range(4000)]
    spread = np.std([y_B.sum() / weight_B.sum() for y_B, weight_B in samples])
    estimates = [ratio_stderr(y_B, weight_B) for y_B, weight_B in samples]
    assert np.mean(estimates) == pytest.approx(spread, rel=0.05)
    as_if_independent = np.sqrt((0.7**2 + 1) / np.mean([weight_B.sum() for _, weight_B in samples]))
    assert spread > 2 * as_if_independent


def test_standard_error_of_equal_rows_is_the_textbook_one() -> None:
    y_B = np.random.default_rng(0).normal(size=50)
    assert ratio_stderr(7 * y_B, np.full(50, 7.0)) == pytest.approx(y_B.std(ddof=1) / math.sqrt(50))


def test_one_row_has_no_standard_error() -> None:
    assert math.isnan(ratio_stderr(np.ones(1), np.ones(1)))


def test_the_interval_of_an_accuracy_covers() -> None:
    rng = np.random.default_rng(0)
    found = [estimate((rng.random(200) < 0.3).astype(float), np.ones(200)) for _ in range(4000)]
    covered = np.mean([abs(one.value - 0.3) < 1.96 * one.stderr for one in found])
    assert covered == pytest.approx(0.95, abs=0.012)  # three standard errors of 4000 coins


@pytest.mark.parametrize("items", [1, 30, 400])
def test_the_interval_of_a_share_is_wilson_s(items: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    for right in {0, 1, items // 3, items}:
        expected = stats.binomtest(right, items).proportion_ci(method="wilson")
        y_B = np.arange(items) < right
        one = estimate(y_B.astype(float), np.ones(items))
        assert (one.low, one.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.97])
def test_the_interval_of_a_share_covers(share: float) -> None:
    """By enumeration, where value +- 1.96 stderr does not cover, too."""
    items = 100
    right = np.arange(items + 1)
    log_counts = [math.lgamma(items + 1) - math.lgamma(k + 1) - math.lgamma(items - k + 1) for k in right]
    p = np.exp(log_counts + right * math.log(share) + (items - right) * math.log1p(-share))
    low, high = np.array([wilson(k / items, items) for k in right]).T
    assert p[(low <= share) & (share <= high)].sum() == pytest.approx(0.95, abs=0.035)
    half = 1.96 * np.sqrt(right / items * (1 - right / items) / (items - 1))
    plain = p[np.abs(right / items - share) <= half].sum()
    assert plain < 0.9 or share in (0.1, 0.5)


def test_other_numbers_have_the_interval_of_normal_theory() -> None:
    rng = np.random.default_rng(0)
    one = estimate(rng.random(50), np.ones(50))
    half = 1.96 * one.stderr
    assert (one.low, one.high) == pytest.approx((one.value - half, one.value + half), abs=1e-4)


def test_the_interval_of_bits_per_byte_covers() -> None:
    """Items of very unequal size, whose rate depends on their size."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        bytes_B = rng.lognormal(3, 0.8, size=count)
        return bytes_B * (1 + 3 / np.sqrt(bytes_B) + 0.2 * rng.normal(size=count)), bytes_B

    many = draw(4_000_000)
    truth = many[0].sum() / many[1].sum()
    found = [estimate(*draw(300)) for _ in range(4000)]
    assert np.mean([abs(one.value - truth) < 1.96 * one.stderr for one in found]) == pytest.approx(0.95, abs=0.015)


def test_a_macro_average_counts_categories_the_same() -> None:
    one = macro([of_normal_theory(0.2, 0.03, 10), of_normal_theory(0.6, 0.04, 990)])
    assert one.value == pytest.approx(0.4) and one.stderr == pytest.approx(0.025) and one.items == 1000


def test_the_interval_of_a_macro_average_covers() -> None:
    rng = np.random.default_rng(0)
    sizes, rates = (20, 60, 300), (0.5, 0.3, 0.8)

    def draw() -> Estimate:
        return macro(
            [estimate((rng.random(n) < p).astype(float), np.ones(n)) for n, p in zip(sizes, rates, strict=True)]
        )

    found = [draw() for _ in range(3000)]
    covered = np.mean([one.low < np.mean(rates) < one.high for one in found])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_a_macro_average_of_none_or_all_is_not_certain() -> None:
    all_right = estimate(np.ones(30), np.ones(30))
    one = macro([all_right, all_right])
    assert one.value == one.high == 1.0 and one.stderr == 0.0
    assert one.low == pytest.approx(1 - (1 - all_right.low) / math.sqrt(2))


# Two models -------------------------------------------------------------------------------------------------------


def models(edge: float, seed: int, repeats: int, items: int = 250) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Right or wrong of two models on the same items: an item's difficulty is shared, and one model has an edge."""
    rng = np.random.default_rng(seed)
    for _ in range(repeats):
        easy_B = rng.beta(0.6, 0.6, size=items) * (1 - edge)
        yield (rng.random(items) < easy_B + edge).astype(float), (rng.random(items) < easy_B).astype(float)


@pytest.mark.parametrize("edge", [0.0, 0.06])
def test_the_interval_of_a_paired_difference_covers(edge: float) -> None:
    ones = np.ones(250)
    found = [difference((a, ones), (b, ones)) for a, b in models(edge, 0, 4000)]
    assert np.mean([one.low < edge < one.high for one in found]) == pytest.approx(0.95, abs=0.012)


def paired(b: int, c: int, items: int) -> Difference:
    """Of two models of which one alone is right b times, the other c times."""
    right_B = np.arange(items)
    return difference(*(((part).astype(float), np.ones(items)) for part in (right_B < b, right_B >= items - c)))


@pytest.mark.parametrize("items", [1, 30, 400])
def test_the_difference_of_models_that_never_disagree_is_not_certain(items: int) -> None:
    """It is a share of none: as far as Wilson's interval of none goes, to either side."""
    one = paired(0, 0, items)
    assert (one.value, -one.low, one.high) == (0, one.high, pytest.approx(wilson(0.0, items)[1]))


def test_the_interval_of_a_difference_of_shares_is_where_their_score_test_ends() -> None:
    """Zero is in it as long as (b - c)^2 / (b + c), McNemar's statistic, is below 1.96^2."""
    for b, c in itertools.product(range(12), repeat=2):
        one = paired(b, c, 40)
        assert one.low <= one.value <= one.high and one.low >= -1 and one.high <= 1
        assert (one.low <= 0 <= one.high) == ((b - c) ** 2 <= Z_95**2 * (b + c))
    assert paired(40, 0, 40).high == paired(40, 0, 40).value == 1


@pytest.mark.parametrize(("p", "q"), [(0.01, 0.0), (0.02, 0.01), (0.1, 0.05)])
def test_the_interval_of_a_difference_of_shares_covers(p: float, q: float) -> None:
    """By enumeration of who alone is right, which happens with probability p, or q, where +- 1.96 stderr does not."""
    items, most, covered, plain = 100, 26, 0.0, 0.0
    for b, c in itertools.product(range(most), repeat=2):
        same = items - b - c
        ways = math.factorial(items) // (math.factorial(b) * math.factorial(c) * math.factorial(same))
        chance, one = ways * p**b * q**c * (1 - p - q) ** same, paired(b, c, items)
        covered += chance * (one.low <= p - q <= one.high)
        plain += chance * (abs(one.value - (p - q)) <= 1.96 * one.stderr)
    assert covered > 0.93 and (plain < 0.9 or p > 0.05)


def test_pairs_tell_more_than_two_numbers() -> None:
    ones = np.ones(250)
    (pair,) = models(0.0, 1, 1)
    paired = difference((pair[0], ones), (pair[1], ones))
    apart = math.hypot(estimate(pair[0], ones).stderr, estimate(pair[1], ones).stderr)
    assert paired.stderr < 0.85 * apart
    assert paired.value == pytest.approx(pair[0].mean() - pair[1].mean())
    assert paired.stderr == pytest.approx((pair[0] - pair[1]).std(ddof=1) / math.sqrt(250))


def test_the_interval_of_a_difference_of_ratios_covers() -> None:
    """Bits per byte of two models: sizes are shared, and so is most of what makes a text hard."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> Difference:
        bytes_B = rng.lognormal(3, 0.7, size=count)
        hard_B = rng.normal(2, 0.5, size=count)
        first, second = (bytes_B * (hard_B + rng.normal(shift, 0.1, size=count)) for shift in (-0.02, 0.0))
        return difference((first, bytes_B), (second, bytes_B))

    found = [draw(200) for _ in range(4000)]
    assert np.mean([one.low < -0.02 < one.high for one in found]) == pytest.approx(0.95, abs=0.015)
    assert np.mean([one.high < 0 for one in found]) > 0.3  # a difference far below the spread of texts is seen


def test_a_macro_difference() -> None:
    parts = ((0.1, 0.03, 10), (-0.3, 0.04, 20))
    one = macro_difference([Difference(value, e, value - 1.96 * e, value + 1.96 * e, n) for value, e, n in parts])
    assert (one.value, one.stderr, one.items) == (pytest.approx(-0.1), pytest.approx(0.025), 30)
    assert (one.low, one.high) == (
        pytest.approx(-0.1 - 1.96 * 0.025, abs=1e-5),
        pytest.approx(-0.1 + 1.96 * 0.025, abs=1e-5),
    )


def test_the_same_answers_do_not_differ() -> None:
    y_B = np.arange(5.0)
    assert difference((y_B, np.ones(5)), (y_B, np.ones(5))) == (0.0, 0.0, 0.0, 0.0, 5)


# McNemar ----------------------------------------------------------------------------------------------------------


def test_mcnemar_by_enumeration() -> None:
    """The p value is the probability, over all assignments of the disagreements, of one at least as uneven."""
    for b, c in itertools.product(range(7), range(6)):
        first_B, second_B = np.array([1.0] * b + [0.0] * c + [1, 0]), np.array([0.0] * b + [1.0] * c + [1, 0])
        found = mcnemar(first_B, second_B)
        worlds = list(itertools.product((0, 1), repeat=b + c))
        as_uneven = sum(abs(2 * sum(world) - (b + c)) >= abs(b - c) for world in worlds)
        assert (found.first_only, found.second_only) == (b, c)
        assert found.p == pytest.approx(as_uneven / len(worlds))


def test_mcnemar_is_right_about_equal_models_and_sees_better_ones() -> None:
    equal = [mcnemar(a, b).p for a, b in models(0.0, 2, 3000)]
    assert 0.02 < np.mean([p <= 0.05 for p in equal]) <= 0.05 + 0.012
    better = [mcnemar(a, b).p for a, b in models(0.15, 3, 500)]
    assert np.mean([p <= 0.05 for p in better]) > 0.8


def test_mcnemar_of_large_counts() -> None:
    found = mcnemar(np.r_[np.ones(3000), np.zeros(2800)], np.r_[np.zeros(3000), np.ones(2800)])
    z = (200 - 1) / math.sqrt(5800)  # the normal approximation with Yates's correction
    assert found.p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)
