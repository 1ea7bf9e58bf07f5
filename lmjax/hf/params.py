"""Params from a Hugging Face checkpoint and back.

Every tensor goes from its file to the devices that need it before the next one is read: beside the params, the host
never holds more than two copies of one tensor. Params are float32, whatever the files hold; what is written has the
dtype asked for.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.errors import CheckpointError
from lmjax.hf.config_json import Family
from lmjax.hf.shards import DTYPES, Stored, list_tensors, read_tensors, write_tensors
from lmjax.hf.tensors import Expected, expected, join, split
from lmjax.models.config import ModelConfig
from lmjax.models.decoder import weights
from lmjax.weights import Params, Weight, by_path, nested

HEAD = "lm_head.weight"
# What old checkpoints hold beside what is learned: rotary frequencies, and GPT-2's causal mask.
_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.(bias|masked_bias))")


def read_params(directory: Path, family: Family, cfg: ModelConfig, shardings: Any = None) -> Params:
    """The params of a checkpoint, laid out by `shardings`: a tree like the params, or a part of it, and then only that
    is read (default: all on the first device).

    Raises what `check_tensors` does.
    """
    found, wanted = check_tensors(directory, family, cfg)
    weight_of = by_path(weights(cfg))
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = by_path(shardings) if shardings is not None else dict.fromkeys(weight_of, single)
    leaves = {path: _Leaf(weight_of[path], one) for path, one in sharding.items()}
    needed = [name for name, one in wanted.items() if any(place.path in leaves for place in one.places)]
    for name, x in read_tensors({name: found[name] for name in needed}):
        one = wanted[name]
        for place, part in zip(one.places, split(one, x), strict=True):
            if place.path in leaves:
                leaves[place.path].put(part, place.entry)
    params: Params = nested({path: leaf.array() for path, leaf in leaves.items()})
    return params


def check_tensors(directory: Path, family: Family, cfg: ModelConfig) -> tuple[dict[str, Stored], dict[str, Expected]]:
    """The tensors of a checkpoint by their full names, as they are stored and as the model has them.

    Raises CheckpointError for a tensor that is missing, unknown, of another shape, or of a type that is no weight's.
    """
    spec = weights(cfg)
    found = _full_names(list_tensors(directory), family)
    experts = (cfg.moe.experts or 0) * sum(kind.mlp == "moe" for kind in cfg.kinds)
    if cfg.layers + experts > len(found):  # before names are made up for all of them
        raise CheckpointError(
            f"{directory}: {len(found)} tensors cannot be {cfg.layers} layers with {experts} experts; check config.json"
        )
    wanted = expected(family.tensors, spec, cfg.segments)
    repeats_head = cfg.tied and HEAD in found
    _compare(directory, family, found, wanted, allowed={HEAD} if repeats_head else set())
    if repeats_head:
        _check_repeated_head(directory, found, wanted)
    return found, wanted


def write_params(
    directory: Path, params: Params, family: Family, cfg: ModelConfig, *, dtype: str, shard_bytes: int
) -> list[str]:
    """Write params as safetensors files, cast to `dtype`; the names of the files.

    Raises CheckpointError for a value that `dtype` cannot hold.
    """
    wanted = expected(family.tensors, weights(cfg), cfg.segments)
    shapes = {name: one.shape for name, one in wanted.items()}
    leaves, target = by_path(params), jnp.dtype(dtype)

    def content() -> Iterator[np.ndarray]:
        for name, one in wanted.items():
            parts = [np.asarray(_take(leaves[place.path], place.entry)) for place in one.places]
            with np.errstate(over="ignore"):  # looked for in the next line
                x = join(one, parts).astype(target, copy=False)
            if target != np.float32 and not np.isfinite(x).all():
                raise CheckpointError(f"{name} has values that {dtype} cannot hold; write float32")
            yield x

    return write_tensors(directory, shapes, content(), target, shard_bytes)


# Names and shapes -------------------------------------------------------------------------------------------------


def _full_names(found: Mapping[str, Stored], family: Family) -> dict[str, Stored]:
    """The tensors by their full names, and without those that hold nothing learned."""
    bare = family.tensors[0].name.removeprefix(family.prefix) in found
    named = {family.prefix + name if bare and name != HEAD else name: stored for name, stored in found.items()}
    return {name: stored for name, stored in named.items() if not _BUFFERS.fullmatch(name)}


def _compare(
    directory: Path,
    family: Family,
    found: Mapping[str, Stored],
    wanted: Mapping[str, Expected],
    allowed: set[str],
) -> None:
    def few(names: list[str]) -> str:
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    missing = [name for name in wanted if name not in found]
    unknown = sorted(set(found) - set(wanted) - allowed)
    if missing:
        more = f" (it has {few(unknown)})" if unknown else ""
        raise CheckpointError(
            f"{directory} lacks {few(missing)}{more}; check config.json and that all shards are there"
        )
    if unknown:
        raise CheckpointError(f"{directory} has {few(unknown)}, which a {family.model_type} of its config.json has not")
    for name, one in wanted.items():
        if found[name].shape != one.shape:
            raise CheckpointError(f"{directory}: {name} is {found[name].shape}, by config.json it must be {one.shape}")
        if found[name].dtype not in DTYPES:
            raise CheckpointError(f"{directory}: {name} is {found[name].dtype}; only {', '.join(DTYPES)} are read")


def _check_repeated_head(directory: Path, found: Mapping[str, Stored], wanted: Mapping[str, Expected]) -> None:
    embed = next(name for name, one in wanted.items() if one.places[0].path == "embed")
    same = found[HEAD].shape == found[embed].shape and found[HEAD].dtype == found[embed].dtype
    if same:
        (_, head), (_, table) = (next(read_tensors({name: found[name]})) for name in (HEAD, embed))
        same = np.array_equal(head, table)
    if not same:
        raise CheckpointError(f"{directory}: {HEAD} is not {embed} although config.json says tie_word_embeddings")


# Devices ----------------------------------------------------------------------------------------------------------


class _Leaf:
    """One array of the params being filled, in place, on every device of this process that holds some of it."""

    def __init__(self, weight: Weight, sharding: jax.sharding.Sharding):
        self._shape, self._sharding = weight.shape, sharding
        self._regions = {
            device: [range(*one.indices(size)) for one, size in zip(index, weight.shape, strict=True)]
            for device, index in sharding.addressable_devices_indices_map(weight.shape).items()
            if index is not None
        }
        self._buffers: dict[jax.Device, jax.Array] = {}

    def put(self, x: np.ndarray, index: tuple[int, ...]) -> None:
        """Write the entry `index` (along the batch axes) from the host; returns when the devices have it."""
        for device, region in self._regions.items():
            batch, rest = region[: len(index)], region[len(index) :]
            if not all(i in part for i, part in zip(index, batch, strict=True)):
                continue
            if device not in self._buffers:
                self._buffers[device] = jnp.zeros([len(part) for part in region], jnp.float32, device=device)
            piece = _contiguous(x[tuple(slice(part.start, part.stop) for part in rest)])
            start = [i - part.start for i, part in zip(index, batch, strict=True)]
            filled = _insert(self._buffers[device], jax.device_put(piece, device), start)
            self._buffers[device] = jax.block_until_ready(filled)

    def array(self) -> jax.Array:
        buffers = [self._buffers[device] for device in self._regions]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, buffers)


def _contiguous(x: np.ndarray) -> np.ndarray:
    """Copied as plain integers where needed: numpy moves 16-bit floats one by one."""
    integers = x.view(np.dtype(f"uint{8 * x.dtype.itemsize}"))
    return np.ascontiguousarray(integers).view(x.dtype)


def _insert_one(buffer: jax.Array, x: jax.Array, index: list[jax.Array]) -> jax.Array:
    x = x.astype(buffer.dtype).reshape((1,) * len(index) + x.shape)
    return jax.lax.dynamic_update_slice(buffer, x, [*index, *[0] * (x.ndim - len(index))])


_insert = jax.jit(_insert_one, donate_argnums=0)


@jax.jit
def _take(leaf: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    """The entry `index` along the first axes."""
    for i in index:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    return leaf
