"""Seal a directory: one manifest with a hash of every file, written last, that proves the directory whole.

    {"version": 1, "lmjax": "0.1.0", ...a step's document..., "files": {"state/d/5c3e": ["<blake2b>", 516]},
     "self": "<blake2b>"}

A directory without a manifest was never finished. One whose manifest or files do not match it is damaged.
"""

import concurrent.futures
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any

import ml_dtypes  # noqa: F401  # by which numpy knows bfloat16
import numpy as np
from etils import epath
from pydantic import AfterValidator

from lmjax.errors import CheckpointError, ConfigError
from lmjax.record import formats
from lmjax.record.files import drafted, hash_and_size, hash_bytes, is_remote, naming, write_atomically
from lmjax.schema import NonNegativeInt, config_class, validated

FORMAT = 1
MANIFEST = "LMJAX_MANIFEST.json"
_DIGEST_BYTES = 16

Manifest = dict[str, Any]
Hashes = dict[str, list[Any]]
"""`{name: [hash, bytes]}`."""


def _inside(name: str) -> str:
    if not name or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"'{name}' is not below the step")
    return name


def _dtype(name: str) -> str:
    try:
        np.dtype(name)
    except TypeError:
        raise ValueError(f"there is no type '{name}'") from None
    return name


@config_class
class Step:
    """What the manifest of a step holds."""

    version: int
    """The format."""
    lmjax: str = ""
    """The version that wrote it; older ones do not say."""
    step: NonNegativeInt
    time: float
    value: float | None
    meta: dict[str, Any]
    leaves: dict[str, tuple[list[NonNegativeInt], Annotated[str, AfterValidator(_dtype)]]]
    """Shape and dtype by path."""
    files: dict[Annotated[str, AfterValidator(_inside)], tuple[str, NonNegativeInt]]
    """Hash and bytes by name."""


def is_sealed(directory: epath.Path) -> bool:
    """Whether a seal was written, good or damaged."""
    return (directory / MANIFEST).exists()


def every(name: str) -> bool:
    """All files are meant: where several processes share the work, each passes a predicate of its own instead."""
    return True


def hash_files(directory: epath.Path, mine: Callable[[str], bool] = every) -> Hashes:
    """Hash the files whose names are `mine`, as the disk holds them. Raises OSError when the storage fails."""
    present = {name: path for name, path in files(directory).items() if mine(name)}
    _drop_from_page_cache(present.values())
    return _hash_files(present)


def write(directory: epath.Path, document: Manifest, hashes: Hashes) -> None:
    """Write the manifest, with `hashes` of all files. Raises OSError when the storage fails."""
    text = _canonical({"version": FORMAT, "lmjax": formats.version()} | document | {"files": hashes})
    write_atomically(directory / MANIFEST, _canonical(json.loads(text) | {"self": _digest(text)}))


def copy(source: epath.Path, target: epath.Path, meta: Mapping[str, Any]) -> list[str]:
    """Copy a sealed step, the seal last, with `meta` in place of its own where it has such; what is wrong with the
    source, and then there is no seal at `target`.

    Raises OSError when the storage fails.
    """
    manifest, problems = read(source)
    if problems:
        return problems
    for name, listed in manifest["files"].items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with naming(target / name, listed[1]), drafted(target / name) as file:
            if list(hash_and_size(source / name, file, digest_size=_DIGEST_BYTES)) != listed:
                return [f"{name} has other contents"]
    _drop_from_page_cache(files(target).values())
    document = {key: value for key, value in manifest.items() if key not in ("version", "lmjax", "files")}
    write(target, document | {"meta": {**manifest["meta"], **meta}}, manifest["files"])
    return []


def read(directory: epath.Path) -> tuple[Manifest, list[str]]:
    """The manifest and what is wrong with it; the files are not looked at.

    Raises CheckpointError for one that is whole, but of a later format: that is no damage.
    """
    path = directory / MANIFEST
    try:
        document = json.loads(path.read_text())
        recorded = document.pop("self")
        intact = _digest(_canonical(document)) == recorded
    except FileNotFoundError:
        return {}, ["it was never sealed"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return {}, [f"{MANIFEST} is unreadable ({type(error).__name__})"]
    if not intact:
        return {}, [f"{MANIFEST} was altered"]
    formats.check(path, document.get("version"), document.get("lmjax"), FORMAT, CheckpointError)
    try:
        validated(Step, document, strict=True)
    except ConfigError as error:
        return {}, [f"{MANIFEST} is not that of a step: {error}"]
    if directory.name.isdigit() and int(directory.name) != document["step"]:
        return {}, [f"it is step {document['step']}, under the name of another"]
    return document, []


def check(
    directory: epath.Path, *, hash_files: bool, mine: Callable[[str], bool] = every
) -> tuple[Manifest, list[str]]:
    """The manifest and what is wrong with the directory: names, sizes and, with `hash_files`, contents of `mine`."""
    manifest, problems = read(directory)
    if problems:
        return manifest, problems
    try:
        hashed = mine if hash_files else None
        return manifest, list(_differences(files(directory), manifest["files"], hashed))
    except OSError as error:
        return manifest, [f"a file is unreadable ({error})"]


def _differences(
    present: Mapping[str, epath.Path], listed: Mapping[str, Any], hashed: Callable[[str], bool] | None
) -> Iterator[str]:
    yield from (f"{name} is missing" for name in listed if name not in present)
    yield from (f"{name} is not in the manifest" for name in present if name not in listed)
    both = {name: path for name, path in present.items() if name in listed}
    sizes = {name: path.stat().length for name, path in both.items()}
    yield from (
        f"{name} has {sizes[name]} bytes, not {listed[name][1]}" for name in both if sizes[name] != listed[name][1]
    )
    if hashed is not None:
        found = _hash_files({name: path for name, path in both.items() if hashed(name)})
        yield from (f"{name} has other contents" for name in found if found[name] != listed[name])


def files(directory: epath.Path) -> dict[str, epath.Path]:
    """Every file but the seal, by relative name. NFS leaves `.nfs...` behind for open files that were deleted."""

    def walk(prefix: str, parent: epath.Path) -> Iterator[tuple[str, epath.Path]]:
        for child in parent.iterdir():
            if child.is_dir():
                yield from walk(f"{prefix}{child.name}/", child)
            elif not child.name.startswith((".nfs", MANIFEST)):
                yield prefix + child.name, child

    return dict(sorted(walk("", directory)))


def _hash_files(paths: Mapping[str, epath.Path]) -> Hashes:
    """Hashing releases the interpreter lock, so threads help."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(zip(paths, pool.map(_hash_file, paths.values()), strict=True))


def _hash_file(path: epath.Path) -> list[Any]:
    return list(hash_and_size(path, digest_size=_DIGEST_BYTES))


def _canonical(document: Any) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(text: str) -> str:
    return hash_bytes(text.encode(), digest_size=_DIGEST_BYTES)


def _drop_from_page_cache(paths: Iterable[epath.Path]) -> None:
    """Force files to the disk and out of memory, so that a check reads what the disk holds."""
    for path in itertools.filterfalse(is_remote, paths):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
