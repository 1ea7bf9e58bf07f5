"""The permutation by formula: one to one, random enough, never different on another machine."""

import numpy as np
import pytest

from lmjax.data.permutation import permuted


@pytest.mark.parametrize("n", [*range(1, 40), 100, 255, 256, 257, 4096, 99_991])
def test_is_one_to_one(n):
    for epoch in range(3):
        assert np.array_equal(np.sort(permuted(np.arange(n), n, seed=n, epoch=epoch)), np.arange(n))


def test_entries_do_not_depend_on_which_are_asked_for():
    whole = permuted(np.arange(1000), 1000, 3, 4)
    asked = np.random.default_rng(0).integers(0, 1000, (5, 7))
    assert np.array_equal(permuted(asked, 1000, 3, 4), whole[asked])
    assert permuted(np.array([1 << 40]), 1 << 41, 3, 4).shape == (1,)


def test_is_what_it_always_was():
    """Checkpoints hold positions in this order: a change of it needs a new number in the loader's fingerprint."""
    assert permuted(np.arange(10), 10, 7, 2).tolist() == GOLDEN_10
    assert permuted(np.arange(3), 1_000_003, (1 << 64) - 1, 5).tolist() == GOLDEN_LARGE


GOLDEN_10 = [2, 1, 8, 5, 7, 0, 9, 4, 6, 3]
GOLDEN_LARGE = [194121, 791237, 53131]


def test_seeds_and_epochs_differ_and_every_order_of_three_turns_up():
    orders = {tuple(permuted(np.arange(50), 50, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400
    small = [tuple(permuted(np.arange(3), 3, 0, epoch)) for epoch in range(600)]
    counts = {order: small.count(order) for order in set(small)}
    assert len(counts) == 6 and min(counts.values()) > 50


def test_looks_random():
    n, epochs = 400, 300
    orders = np.stack([permuted(np.arange(n), n, 1, epoch) for epoch in range(epochs)])
    # Mean place of each entry, in standard deviations of a uniform draw: none far out, none systematic.
    places = (orders.mean(0) - (n - 1) / 2) / (n / 12**0.5 / epochs**0.5)
    assert np.abs(places).max() < 4.5 and 0.8 < places.std() < 1.2
    # Neighbours stay neighbours no more often than chance has it.
    assert (np.abs(np.diff(orders, axis=1)) == 1).mean() < 3 * 2 / n
