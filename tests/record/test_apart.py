"""Copies that no step changes, on pages that the system has back."""

import errno
import mmap
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.process import start_up
from lmjax.record import apart


@pytest.mark.parametrize("shape", [(), (3,), (1 << 10, 1 << 10)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.bool_])
def test_copies_are_equal_and_elsewhere(shape: tuple[int, ...], dtype) -> None:
    array = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    (copy,) = apart.apart({"x": array}).values()
    assert copy.dtype == array.dtype and copy.sharding == array.sharding
    assert copy.unsafe_buffer_pointer() != array.unsafe_buffer_pointer()
    np.testing.assert_array_equal(np.asarray(copy), np.asarray(array))


def test_shards_stay_on_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_LARGE", 0)
    device = jax.devices()[-1]
    (copy,) = apart.apart({"x": jax.device_put(jnp.arange(6.0), device)}).values()
    assert copy.devices() == {device} and copy.tolist() == list(range(6))


def test_a_kernel_without_huge_pages_saves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(apart.mmap, "mmap", type("Pages", (mmap.mmap,), {"madvise": refused}))
    array = jnp.arange(1 << 19, dtype=jnp.float32)
    np.testing.assert_array_equal(np.asarray(apart.apart({"x": array})["x"]), np.asarray(array))


RETURNED = """
    import gc
    from lmjax.process import start_up
    start_up.tune_allocator()
    import jax.numpy as jnp
    from lmjax.record.apart import apart

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

    array = jnp.ones((64, 1 << 20))
    jnp.copy(array).block_until_ready()  # a hole in malloc's memory: copies are not put there
    seen = [resident()]
    for _ in range(2):
        copies = apart({"x": array})
        seen.append(resident())
        del copies
        gc.collect()  # JAX lets go of numpy's arrays at the next collection, or when it is given another
        seen.append(resident())
    print(*seen)
"""


@pytest.mark.skipif(not start_up._on_glibc(), reason="needs glibc")
def test_their_memory_is_given_back() -> None:
    command = [sys.executable, "-c", textwrap.dedent(RETURNED)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    before, *seen = map(int, done.stdout.split())
    assert np.allclose(np.subtract(seen, before), [256, 0, 256, 0], atol=24), done.stdout
