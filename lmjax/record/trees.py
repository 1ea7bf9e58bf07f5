"""Trees of arrays as a checkpoint stores them, by path."""

import functools
import logging
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lmjax.errors import CheckpointError, StallError, one_line
from lmjax.process import group
from lmjax.record.seal import Manifest


@functools.cache
def orbax() -> Any:
    """Loaded when a checkpoint is first touched: it takes seconds, and configs import this module."""
    from orbax.checkpoint import v1

    _say_failures_once()
    return v1


def _say_failures_once() -> None:
    """A failure in its threads Orbax raises, and logs, too, with a traceback for each of them; TensorStore has another
    printed for every array that was on its way, since nobody waits for it any more."""
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


ORBAX_TURN = threading.BoundedSemaphore()
"""Held from the start of a save or a load to its last byte. Orbax numbers what it does in one counter of the process
and reads it again as it goes on: of two saves that overlap, as of runs in one process, one writes into directories that
are not there yet."""


_PIECE_BYTES = 16_000_000


def uncompressed() -> Any:
    """A context of Orbax to save in. Compression takes eight per cent off trained weights, for five times the CPU time
    of writing them: time that training has to do without."""
    context = orbax().Context()
    context.array.saving.use_compression = False
    return context


def one_array_at_a_time(arrays: Any) -> Any:
    """A context to save or restore a state of such arrays (or shapes) in little memory beside it; slower than all at
    once.

    What is saved here is stored in pieces, so that reading it takes no more than one of them beside its array.
    """
    context = uncompressed()
    room = 1 + max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    context.memory.write_concurrent_bytes = context.memory.read_concurrent_bytes = room
    context.array.saving.storage_options.chunk_byte_size = _PIECE_BYTES
    return context


def count_parts(leaves: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """`{part: (leaves, array entries, bytes)}`."""
    parts: dict[str, tuple[int, int, int]] = {}
    for path, (shape, dtype) in leaves.items():
        count, entries, size = parts.get(path.split("/")[0], (0, 0, 0))
        length = int(np.prod(shape, dtype=np.int64))
        parts[path.split("/")[0]] = (count + 1, entries + length, size + length * jax.numpy.dtype(dtype).itemsize)
    return parts


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by path, `{"opt_state/0/mu/embed": leaf}`: the same for a tuple, a list, a dataclass or
    a dict with these names, so that a checkpoint does not depend on the classes that held its arrays."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    assert len(leaves) == len(pairs), "two leaves of the state have the same path"
    return leaves


def shape_dtype(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]


def load_tree(
    path: epath.Path, manifest: Manifest, abstract: Any, saved: Mapping[str, Any], unread: tuple[str, ...] = ()
) -> Any:
    """Load the leaves of `abstract`, which must be exactly `saved`, onto their shardings; those of the top-level parts
    `unread` stay as they are."""
    leaves = leaves_by_path(abstract)
    wanted = {name: leaf for name, leaf in leaves.items() if name.split("/")[0] not in unread}
    _compare(path, saved, {name: shape_dtype(leaf) for name, leaf in wanted.items()})
    request = dict.fromkeys(manifest["leaves"], orbax().PLACEHOLDER) | {k: _with_sharding(v) for k, v in wanted.items()}
    try:
        with group.naming_lost_peers(f"checkpoint {path} was not loaded"), ORBAX_TURN:
            loaded = orbax().load(path, request)
    except StallError:
        raise
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} verifies but cannot be loaded: {one_line(error, 300)}") from error
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [loaded[name] if name in wanted else leaf for name, leaf in leaves.items()]
    )


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf without a sharding goes to the first device, never to wherever it was saved from."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _compare(path: epath.Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless both trees have the same paths, shapes and dtypes: nothing is ever cast."""

    def show(leaf: list[Any] | None) -> str:
        return "absent" if leaf is None else f"{leaf[1]}[{','.join(map(str, leaf[0]))}]"

    names = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
    if names:
        rows = [f"{name} is {show(saved.get(name))} saved, {show(wanted.get(name))} wanted" for name in names[:10]]
        more = f"; and {len(names) - 10} more" if len(names) > 10 else ""
        raise CheckpointError(
            f"checkpoint {path} does not fit this model and optimizer: {'; '.join(rows)}{more}; "
            "use the config it was saved with, or another workdir"
        )
