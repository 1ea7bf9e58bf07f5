"""Copies of arrays: no single bit may differ unnoticed."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.devices.replicas import _described, _digest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "int8"])
def test_any_one_bit_changes_the_digest(dtype: str) -> None:
    x = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)) * 50, dtype))
    right = int(_digest(jnp.asarray(x)))
    for byte in range(x.nbytes):
        for bit in range(8):
            wrong = x.copy()
            wrong.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
            assert int(_digest(jnp.asarray(wrong))) != right
    assert int(_digest(jnp.asarray(x))) == right


@pytest.mark.parametrize(
    ("digests", "said"),
    [
        ([1, 1, 1], None),
        ([1, 2, 1], "w on device 1 differs from the others"),
        ([1, 2, 1, 3, 1], "w on device 1, device 3 differs from the others"),
        ([1, 2], "w on device 0, device 1 differs from each other"),
        ([1, 1, 2, 2], "w on device 0, device 1, device 2, device 3 differs from each other"),
    ],
)
def test_who_differs_from_most_is_named(digests: list[int], said: str | None) -> None:
    copies = {"v": [("device 0", 7), ("device 1", 7)], "w": [(f"device {i}", x) for i, x in enumerate(digests)]}
    assert next(_described(copies), None) == said
