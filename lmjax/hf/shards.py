"""Safetensors on disk: which tensors a directory holds, one at a time in and out.

A checkpoint is `model.safetensors`, or several shards that `model.safetensors.index.json` lists. Headers are checked
before a byte of content is used; nothing is unpickled.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lmjax.errors import CheckpointError, ConfigError
from lmjax.hf.config_json import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# As safetensors spells them; quantized types are not weights yet.
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": jnp.dtype("bfloat16")}


class Stored(NamedTuple):
    """A tensor as its file's header describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def list_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, from the headers alone.

    Raises CheckpointError for files that are missing, damaged, outside the directory, or not what the index says.
    """
    if (directory / SINGLE).exists():
        return list_file(directory / SINGLE)
    if not (directory / INDEX).exists():
        raise CheckpointError(_nothing_to_read(directory))
    listed = _read_index(directory / INDEX)
    found: dict[str, Stored] = {}
    for name in sorted(set(listed.values())):
        if not (directory / name).exists():
            raise CheckpointError(f"{directory / name} is missing, which {INDEX} lists; download the checkpoint again")
        found |= list_file(directory / name)
    wrong = [name for name in {**listed, **found} if name not in found or listed.get(name) != found[name].file.name]
    if wrong:
        raise CheckpointError(f"{directory}: the shards do not hold '{wrong[0]}' as {INDEX} says; download them again")
    return found


def _nothing_to_read(directory: Path) -> str:
    pickles = sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")])
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code and is never read; save the model as safetensors "
            "(save_pretrained does)"
        )
    return f"{directory} holds no {SINGLE} and no {INDEX}; give the directory of a Hugging Face checkpoint"


def _read_index(path: Path) -> dict[str, str]:
    try:
        listed = read_json(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to files; restore the file")
    for file in listed.values():
        if not file.endswith(".safetensors") or Path(file).name != file or "\\" in file:
            raise CheckpointError(f"{path} lists '{file[:100]}', which is no .safetensors file of its directory")
    return listed


def list_file(path: Path) -> dict[str, Stored]:
    """Every tensor of one file, from its header. Raises CheckpointError for a file that is damaged."""
    with _reading(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        return {name: Stored(path, name, tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}


def read_tensors(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, np.ndarray]]:
    """(key, content) of one tensor after another, file by file."""
    by_file: dict[Path, list[str]] = {}
    for key, stored in tensors.items():
        by_file.setdefault(stored.file, []).append(key)
    for path, keys in by_file.items():
        with _reading(path) as file:
            for key in keys:
                yield key, file.get_tensor(tensors[key].name)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """An open safetensors file, whose errors are ours.

    Read, not mapped: mapped pages count as memory of this process until the system takes them back.
    """
    try:
        import safetensors
    except ImportError:
        raise CheckpointError("safetensors files need an extra; install lmjax[hf]") from None
    try:
        with safetensors.safe_open(path, "np", backend="pread") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({str(error)[:200]}); download it again") from None


# Writing ----------------------------------------------------------------------------------------------------------


def write_tensors(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[np.ndarray],
    dtype: np.dtype,
    shard_bytes: int,
) -> list[str]:
    """Write tensors, given in the order of `shapes`, as one file or as shards with an index; the names of the files.

    A shard is closed before it would grow beyond `shard_bytes`. Only one tensor is held in memory.
    """
    groups = _shards({name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}, shard_bytes)
    files = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    )
    content = iter(tensors)
    for file, names in zip(files, groups, strict=True):
        write_file(directory / file, {name: shapes[name] for name in names}, content, dtype)
    if len(groups) == 1:
        return files
    total = sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())
    weight_map = {name: file for file, names in zip(files, groups, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
    return [*files, INDEX]


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], content: Iterator[np.ndarray], dtype: np.dtype
) -> None:
    """The format: the header's length in 8 bytes, the header as JSON padded to 8 bytes, the tensors end to end."""
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            x = next(content)
            assert x.shape == shape and x.dtype == dtype, f"{path}: {x.dtype}{x.shape} instead of {dtype}{shape}"
            file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
