"""A state on a CPU, copied to pages of its own while a save reads it."""

import contextlib
import mmap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LARGE = 1 << 20
"""Bytes from which an array gets its own pages."""


def apart(leaves: dict[str, Any]) -> dict[str, Any]:
    """The arrays as no step will change them. Elsewhere than on a CPU Orbax copies them to the host.

    On a CPU it would hold on to them, and the next step, which then cannot write where they are, would take new memory
    for the state. Nor are they copied to where malloc likes: that is the block which the next step wants. The system
    has the pages back once the save has let go of the copies and JAX is given the next array, a batch.
    """
    if jax.default_backend() != "cpu":
        return leaves
    return {path: _copy(leaf) if _is_large(leaf) else jnp.copy(leaf) for path, leaf in leaves.items()}


def _is_large(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and leaf.nbytes >= _LARGE


def _copy(leaf: jax.Array) -> jax.Array:
    parts = [jax.device_put(_on_own_pages(shard.data), shard.device) for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _on_own_pages(array: jax.Array) -> np.ndarray:
    """A copy that JAX takes as it is, for pages are aligned."""
    pages = mmap.mmap(-1, array.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not every system has them, nor every kernel
        pages.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(pages, np.uint8)
    raw[:] = np.asarray(array).reshape(-1).view(np.uint8)  # as bytes: numpy copies bfloat16 number by number
    return raw.view(array.dtype).reshape(array.shape)
