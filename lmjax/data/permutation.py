"""Permutations of range(n) by formula: any entry at once, no memory, the same on every machine and numpy version.

A Feistel network over pairs of numbers below ceil(sqrt(n)), with cycle walking for the few results that are n or more.
"""

import math

import numpy as np

_ROUNDS = 6


def permuted(index: np.ndarray, n: int, seed: int, epoch: np.ndarray | int) -> np.ndarray:
    """Where the permutation of range(n) named by (seed, epoch) sends each of `index`, int64 of any shape below n.

    `epoch` may differ by entry.
    """
    side = np.uint64(math.isqrt(n - 1) + 1)
    name = _mixed(_mixed(np.asarray(epoch, np.uint64)) + np.uint64(seed))
    rounds = np.arange(_ROUNDS, dtype=np.uint64).reshape(-1, *[1] * index.ndim)
    keys = np.broadcast_to(_mixed(name + rounds), (_ROUNDS, *index.shape))
    result = _network(index.astype(np.uint64), side, keys)
    while (outside := result >= n).any():
        result[outside] = _network(result[outside], side, keys[:, outside])
    return result.astype(np.int64)


def drawn(numbers: np.ndarray, n: int) -> np.ndarray:
    """Of int64 `numbers`, those below n as one order sends them that nothing changes, the others as they are.

    So the first of n rows are a fair sample of all of them, and the same one every time.
    """
    known = numbers < n
    return np.where(known, permuted(np.where(known, numbers, 0), n, 0, 0), numbers) if known.any() else numbers


def _network(value: np.ndarray, side: np.uint64, keys: np.ndarray) -> np.ndarray:
    left = value // side
    right = value - left * side
    for key in keys:
        left, right = right, _remainder(left + (_mixed(right + key) >> np.uint64(32)), side)
    return left * side + right


def _remainder(value: np.ndarray, side: np.uint64) -> np.ndarray:
    """value % side; numpy divides many numbers by one with vector instructions, but takes remainders one by one."""
    return value - value // side * side


def _mixed(value: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit of the result depends on every bit of the value."""
    value = np.atleast_1d(value) + np.uint64(0x9E3779B97F4A7C15)  # scalars would warn when they wrap around
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value
