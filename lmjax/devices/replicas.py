"""Copies of an array on several devices are the same to the bit: a device that keeps or computes wrong shows here."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import NumericalError
from lmjax.process import group

Copies = dict[str, list[tuple[str, Any]]]
"""`{"params/embed [0:8]": [("device 0 of process 0", digest), ...]}`: the same piece of an array on every device."""


def check(step: int, state: Any) -> None:
    """Raise NumericalError, naming the device, for copies that differ. All processes call it together."""
    if (found := differing(state)) is not None:
        raise NumericalError(
            f"step {step}: the copy of {found}: its memory or arithmetic is at fault; go on without it, from the last "
            "checkpoint"
        )


def differing(tree: Any) -> str | None:
    """Which copies of what differ, for people; None if none do. All processes call it together.

    What one device holds alone is not looked at. Of three copies or more, those that differ from most are named.
    """
    copies: Copies = defaultdict(list)
    for part in group.gather("digests of copies", _held_here(tree)):
        for name, held in part.items():
            copies[name] += held
    return group.broadcast("copies that differ", next(_described(copies), None))


def _described(copies: Copies) -> Iterator[str]:
    for name, held in copies.items():
        usual, times = Counter(digest for _, digest in held).most_common(1)[0]
        most = 2 * times > len(held)
        odd = [device for device, digest in held if digest != usual or not most]
        if times < len(held):
            yield f"{name} on {', '.join(odd)} differs from {'the others' if most else 'each other'}"


def _held_here(tree: Any) -> Copies:
    """The digests of the copies that this process holds."""
    copies: Copies = defaultdict(list)
    for path, x in _replicated(tree):
        for shard in x.addressable_shards:
            where = ", ".join(f"{cut.start or 0}:{'' if cut.stop is None else cut.stop}" for cut in shard.index)
            device = f"device {shard.device.id} of process {shard.device.process_index}"
            copies[f"{path} [{where}]"].append((device, _digest(shard.data)))
    return {name: [(device, int(digest)) for device, digest in held] for name, held in jax.device_get(copies).items()}


def _replicated(tree: Any) -> Iterator[tuple[str, jax.Array]]:
    """The arrays of which several devices hold the same piece, by path."""
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        pieces = [str(index) for index in x.sharding.devices_indices_map(x.shape).values()]
        if len(set(pieces)) < len(pieces):
            yield jax.tree_util.keystr(path, simple=True, separator="/"), x


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
    """The sum of all words, each times an odd number of its own, modulo 2^32: any one bit that flips changes it."""
    bits = x.dtype.itemsize * 8
    words = jax.lax.bitcast_convert_type(x, f"uint{min(bits, 32)}").ravel().astype(jnp.uint32)
    return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)


def with_flipped_bit(tree: Any) -> Any:
    """For tests: the tree with one bit other in one copy, that of the last device here, of the first array that has
    copies."""
    _, chosen = next(_replicated(tree))
    *right, last = chosen.addressable_shards
    wrong = np.array(last.data)
    wrong.view(np.uint8).reshape(-1)[max(0, wrong.itemsize - 2)] ^= 1
    pieces = [*(shard.data for shard in right), jax.device_put(wrong, last.device)]
    flipped = jax.make_array_from_single_device_arrays(chosen.shape, chosen.sharding, pieces)
    return jax.tree.map(lambda x: flipped if x is chosen else x, tree)
