"""The mixture: in proportion after every sample, by random access."""

import zlib

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from lmjax.data.mixture import MIXTURES, Mixture

weights_lists = st.lists(st.sampled_from([0.05, 0.1, 0.3, 0.7, 1, 2, 3, 5, 1 / 3]), min_size=1, max_size=7)


@settings(max_examples=30, deadline=None)
@given(weights=weights_lists)
def test_every_source_is_always_within_one_of_its_share(weights):
    n = 3000
    source, cursor = Mixture(weights).locate(np.arange(n))
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    share = np.array(weights) / sum(weights)
    assert np.abs(counts - share * np.arange(1, n + 1)[:, None]).max() < 1
    for index in range(len(weights)):  # each source is read in order, without a gap
        assert np.array_equal(cursor[source == index], np.arange(counts[-1, index]))


def test_awkward_weights_keep_their_shares():
    weights = np.random.default_rng(0).dirichlet(np.ones(5))
    mixture = Mixture(weights.tolist())
    cursors = np.array(mixture.cursors(1_000_000_007))
    assert cursors.sum() == 1_000_000_007
    assert np.abs(cursors / 1_000_000_007 - weights).max() < 1 / 65536
    assert Mixture([1e-9, 1.0]).shares == (1, (1 << 20) - 1)  # every source is read at last
    assert Mixture([1e-9, 1.0], resolution=1 << 16).shares == (1, 65535)
    assert Mixture([0.7, 0.3]).shares == (7, 3) and Mixture([2.0, 6.0, 2.0]).shares == (1, 3, 1)


def test_of_many_sources_each_has_its_share():
    """Within 1/1000 of itself, and at every moment within one sample."""
    weights = np.random.default_rng(1).uniform(0.05, 1, 200)
    mixture = Mixture(weights.tolist())
    share = weights / weights.sum()
    assert np.abs(np.array(mixture.shares) / mixture.period / share - 1).max() < 1e-3
    source, _ = mixture.locate(np.arange(20_000))
    counts = np.bincount(source, minlength=200)
    assert np.abs(counts - 20_000 * np.array(mixture.shares) / mixture.period).max() < 1


def test_an_order_of_before_stays():
    """Runs of earlier versions go on in a mixture of 2^16 shares."""
    weights = [0.123456789, 0.00012, 0.3, 0.7, 0.0456]
    source, _ = Mixture(weights, resolution=1 << 16).locate(np.arange(1 << 17))
    assert zlib.crc32(source.astype("<i4").tobytes()) == 3668470879
    assert Mixture([0.7, 0.3], resolution=1 << 16).resolution == Mixture([0.7, 0.3]).resolution


@given(start=st.integers(0, 10**12), weights=weights_lists)
@settings(max_examples=40, deadline=None)
def test_cursors_at_a_sample_are_where_reading_goes_on(start, weights):
    mixture = Mixture(weights)
    expected = mixture.cursors(start)
    for source, cursor in zip(*mixture.locate(np.arange(start, start + 50)), strict=True):
        assert cursor == expected[source]
        expected[source] += 1
    assert mixture.cursors(start + 50) == expected


def test_a_changed_mixture_goes_on_from_given_cursors():
    changed = Mixture([1, 1], origin=1000, cursors=[250, 0])
    source, cursor = changed.locate(np.arange(1000, 1006))
    assert np.array_equal(np.sort(cursor[source == 0]), [250, 251, 252])
    assert np.array_equal(np.sort(cursor[source == 1]), [0, 1, 2])
    assert changed.cursors(1000) == [250, 0] and changed.cursors(1006) == [253, 3]


def test_rules_make_shares_of_weights_and_sizes():
    weights, sizes = [1.0, 3.0], [200, 100]
    assert MIXTURES["by_weight"](weights, sizes) == weights
    assert Mixture(MIXTURES["by_size"](weights, sizes)).shares == (2, 3)
    for rule in MIXTURES.values():
        assert len(rule(weights, sizes)) == 2 and min(rule(weights, sizes)) > 0
