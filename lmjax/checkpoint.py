"""Sealed checkpoints: what is restored is exactly what was saved, or an error says why not.

    checkpoints/
        SEALED                        written with the first seal, kept for ever
        200/                          one directory per step: Orbax's files (the state as `{path: array}`) and
            LMJAX_MANIFEST.json       the seal: meta, tree fingerprint, a hash of every file; written last, atomically
        100.corrupt-20260131-093000/  a step that failed verification, set aside by `restore`
        300.abandoned-20260131-.../   a later step that training went back behind, set aside by `save`

Orbax commits atomically but does not checksum its data: of single bit flips, most restore without a word as other
weights. Hence the seal. A directory without one was never finished (the process died in the save) and counts for
nothing; a directory whose seal or files do not verify is damaged. If steps were ever sealed (SEALED or a damaged
directory says so) and none is good, that is an error; only if none ever was does training start from scratch.

Several processes write one step together: Orbax gives each a folder for the pieces of arrays that it holds, each
hashes what it wrote, and process 0 seals when it has all hashes. Process 0 alone renames and deletes. What a step
holds does not depend on how many wrote it, and any number of processes may read it.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lmjax import distributed, seal
from lmjax.checkpoint_config import CheckpointConfig as CheckpointConfig
from lmjax.errors import CheckpointError, StallError
from lmjax.runtime import fault
from lmjax.seal import Manifest

logger = logging.getLogger(__name__)

SEALED = "SEALED"


@functools.cache
def _orbax() -> Any:
    """Loaded when a checkpoint is first touched: it takes seconds, and configs import this module."""
    from orbax.checkpoint import v1

    return v1


_PIECE_BYTES = 16_000_000


@contextlib.contextmanager
def one_array_at_a_time(arrays: Any) -> Iterator[None]:
    """Save or restore a state of such arrays (or shapes) in little memory beside it; slower than all at once.

    What is saved here is compressed in pieces, so that reading it takes no more than one of them beside its array.
    """
    context = _orbax().Context()
    room = 1 + max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    context.memory.write_concurrent_bytes = context.memory.read_concurrent_bytes = room
    context.array.saving.storage_options.chunk_byte_size = _PIECE_BYTES
    with context:
        yield


class Checkpoints:
    """The checkpoints of one run. All processes of a run call every method together; one run writes a directory."""

    def __init__(self, directory: epath.PathLike, cfg: CheckpointConfig) -> None:
        self.directory = epath.Path(directory).resolve()
        self.last_step: int | None = None
        """The step last saved or restored by this object."""
        self._cfg = cfg
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "lmjax-checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def save(self, step: int, state: Any, meta: Mapping[str, Any], *, value: float | None = None) -> None:
        """Save a pytree of jax arrays with its JSON `meta`; writing, hashing and sealing go on in the background.

        The arrays may be donated as soon as this returns. One save is in flight at a time: a second one first waits
        for it. `value` (lower is better) serves `keep_best`. Existing steps from `step` on belong to a branch that
        training went back behind; they are set aside, never kept in place of the new ones. Raises CheckpointError for
        a failure of this save or of the one before.
        """
        self.wait()
        leaves = _by_path(state)
        manifest = {
            "step": step,
            "time": time.time(),
            "value": float(value) if value is not None and np.isfinite(value) else None,
            "meta": dict(meta),
            "leaves": {path: _shape_dtype(leaf) for path, leaf in leaves.items()},
        }
        path = self.directory / str(step)
        try:
            if distributed.leads():
                self.directory.mkdir(parents=True, exist_ok=True)
                self._clear_from(step)
            with distributed.naming_lost_peers(f"checkpoint {path} was not saved"):
                response = _orbax().save_async(path, leaves)  # which waits for process 0
        except StallError:
            raise
        except Exception as error:
            raise _failure(path, manifest, error) from error
        self.last_step = step
        self._pending = self._worker.submit(self._finish, path, response, manifest)

    def poll(self) -> None:
        """Raise the CheckpointError of a background save that has failed; never blocks."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Block until the last save is sealed and verified. Raises CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, abstract_state: Any, *, step: int | None = None) -> tuple[Any, dict[str, Any], int] | None:
        """`(state, meta, step)` of the newest good step (or of `step`), or None if none was ever sealed.

        `abstract_state` has a `jax.ShapeDtypeStruct` with a sharding at every leaf, and the state comes back in that
        structure. A damaged step is renamed and the one before is used, unless `step` names it. Raises CheckpointError
        for a tree that differs in any path, shape or dtype, and when every sealed step is damaged or gone.
        """
        self.wait()
        if step is not None:
            path = find_step(self.directory, step)
            manifest = _read_verified(path, self._cfg.verify)
            return self._load(path, manifest, abstract_state)
        self._warn_of_unsealed()
        while (newest := self._newest_sealed()) is not None:
            manifest, problems = _check(newest, self._cfg.verify)
            if not problems:
                return self._load(newest, manifest, abstract_state)
            if distributed.leads():
                aside = _set_aside(newest, "corrupt")
                logger.warning("checkpoint %s is damaged (%s); moved to %s", newest, problems[0], aside.name)
        if distributed.share("whether steps were ever sealed", _ever_sealed(self.directory)):
            raise CheckpointError(
                f"{self.directory}: checkpoints were sealed here, but none verifies now; restore one from a backup, "
                "or remove the directory to start again from step 0"
            )
        return None

    def _warn_of_unsealed(self) -> None:
        newest_first = reversed(_step_directories(self.directory))
        for path in itertools.takewhile(lambda path: not seal.is_sealed(path), newest_first):
            if distributed.leads():
                logger.warning("checkpoint %s was never sealed; it is skipped", path)

    def _newest_sealed(self) -> epath.Path | None:
        """As process 0 finds it."""
        newest = newest_sealed(self.directory)
        name = distributed.share("the newest sealed step", None if newest is None else newest.name)
        return None if name is None else self.directory / name

    def _load(self, path: epath.Path, manifest: Manifest, abstract: Any) -> tuple[Any, dict[str, Any], int]:
        state = _load_tree(path, manifest, abstract, saved=manifest["leaves"])
        self.last_step = manifest["step"]
        return state, manifest["meta"], manifest["step"]

    def _finish(self, path: epath.Path, response: Any, manifest: Manifest) -> None:
        """Seal, verify, then delete what is no longer kept. Runs in the background."""
        try:
            with distributed.naming_lost_peers(f"checkpoint {path} was not sealed"):
                fault("checkpoint.write")
                response.result()
                fault("checkpoint.before_seal")
                self._seal(path, manifest)
                fault("checkpoint.after_seal")
                distributed.barrier("the seal")
                _read_verified(path, self._cfg.verify)
        except StallError:
            raise
        except Exception as error:
            with contextlib.suppress(Exception):
                response.result()  # Orbax must have stopped writing before its files are cleared away
            failure = _failure(path, manifest, error)
            if distributed.processes() == 1:  # others may be writing still: then the next save clears up
                _delete(path)
                self._delete_unfinished()
            raise failure from error
        try:
            if distributed.leads():
                self._retain()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path} is sealed, but an older one could not be deleted: {_one_line(error)}"
            ) from error

    def _seal(self, path: epath.Path, manifest: Manifest) -> None:
        """Each process hashes the files that it wrote; process 0 writes the seal."""
        hashes = distributed.gather("hashes of a checkpoint", seal.hash_files(path, _is_mine))
        if distributed.leads():
            seal.write(path, manifest, {name: entry for part in hashes for name, entry in part.items()})
            if not (self.directory / SEALED).exists():
                seal.write_atomically(self.directory / SEALED, f"first sealed step: {manifest['step']}\n")

    def _clear_from(self, step: int) -> None:
        self._delete_unfinished()
        for path in _step_directories(self.directory):
            if int(path.name) >= step and seal.is_sealed(path):
                aside = _set_aside(path, "abandoned")
                logger.warning("step %d is saved again: the existing %s moved to %s", step, path, aside.name)
            elif int(path.name) >= step:
                path.rmtree()

    def _delete_unfinished(self) -> None:
        for path in self.directory.iterdir():
            if ".orbax-checkpoint-tmp" in path.name:
                path.rmtree()

    def _retain(self) -> None:
        """Delete what the config does not keep. Called only once the newest step is sealed and verified."""
        fault("checkpoint.retain")
        values: dict[int, float | None] = {}
        for path in _step_directories(self.directory):
            if seal.is_sealed(path):
                values[int(path.name)] = seal.read(path)[0].get("value")
            else:
                path.rmtree()
        for step in values.keys() - self._kept(values):
            _delete(self.directory / str(step))

    def _kept(self, values: Mapping[int, float | None]) -> set[int]:
        steps = sorted(values)
        best = sorted((value, step) for step, value in values.items() if value is not None)
        forever = (step for step in steps if self._cfg.keep_every and step % self._cfg.keep_every == 0)
        return {*steps[-self._cfg.keep_last :], *forever, *(step for _, step in best[: self._cfg.keep_best])}


def _failure(path: epath.Path, manifest: Manifest, error: Exception) -> CheckpointError:
    need = sum(size for _, _, size in _count_parts(manifest["leaves"]).values()) / 1e9
    local = seal.is_local(path) and path.parent.exists()
    free = f", {shutil.disk_usage(path.parent).free / 1e9:.3f} GB free" if local else ""
    return CheckpointError(
        f"checkpoint {path} was not saved: {_one_line(error)} (it needs up to {need:.3f} GB{free}); "
        "free or mend the storage and run again"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# --- Reading without a run: evaluation, generation, inspection --------------------------------------------------------


def find_step(path: epath.PathLike, step: int | None = None) -> epath.Path:
    """The directory of a sealed step: of `step` or the newest one in a run's workdir or checkpoints directory, or
    `path` itself. Raises CheckpointError when there is none."""
    path = epath.Path(path).resolve()
    if step is None and seal.is_sealed(path):
        return path
    directory = path / "checkpoints" if (path / "checkpoints").exists() else path
    sealed = _sealed_steps(directory)
    if step is None and sealed:
        return sealed[-1]
    found = [child for child in sealed if child.name == str(step)]
    if not found:
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        have = ", ".join(child.name for child in sealed) or "none"
        raise CheckpointError(f"{directory} holds no sealed {which} (sealed steps: {have}); check the path and step")
    return found[0]


def restore_parts(
    path: epath.PathLike, parts: Mapping[str, Any], *, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """`(parts, meta, step)`: top-level parts of a saved state, as in `restore_parts(workdir, {"params": abstract})`.

    `path` is as in `find_step`. Nothing is renamed: a damaged or different checkpoint is a CheckpointError, because
    a number that is reported must not silently come from another step.
    """
    found = find_step(path, step)
    manifest = _read_verified(found, hash_files=True)
    saved = {name: leaf for name, leaf in manifest["leaves"].items() if name.split("/")[0] in parts}
    return _load_tree(found, manifest, dict(parts), saved=saved), manifest["meta"], manifest["step"]


def verify(path: epath.PathLike) -> list[str]:
    """What is wrong with one step or with every sealed step of a directory; empty if all is well.

    A step that was never sealed counts for nothing. Raises CheckpointError when there is nothing to verify.
    """
    path = epath.Path(path).resolve()
    if seal.is_sealed(path):
        return [f"{path.name}: {problem}" for problem in seal.check(path, hash_files=True)[1]]
    directory = path / "checkpoints" if (path / "checkpoints").exists() else path
    steps = _sealed_steps(directory)
    if not steps:
        raise CheckpointError(f"{path} holds no sealed checkpoint; check the path")
    return [f"{step.name}: {problem}" for step in steps for problem in seal.check(step, hash_files=True)[1]]


def sealed_metas(path: epath.PathLike) -> dict[int, dict[str, Any]]:
    """`{step: meta}` of the sealed steps of a run's workdir; those whose seal is damaged are left out."""
    manifests = (seal.read(step)[0] for step in _sealed_steps(epath.Path(path) / "checkpoints"))
    return {manifest["step"]: manifest["meta"] for manifest in manifests if manifest}


def newest_sealed(directory: epath.Path) -> epath.Path | None:
    """The last step of a checkpoints directory that was sealed, whether it verifies or not."""
    return next(reversed(_sealed_steps(directory)), None)


def inspect(path: epath.PathLike, *, step: int | None = None, hashes: bool = False) -> dict[str, Any]:
    """What a checkpoint holds: `step, path, time, value, bytes, meta, leaves, parts, steps` and, on request, `hashes`.

    `leaves` maps each path to `[shape, dtype]`; `parts` maps params, opt_state, ... to leaves, entries and bytes;
    `steps` lists the directory's steps; `hashes` maps each part to a hash of its contents alone, the same
    on whatever mesh and by whatever version it was saved. Raises CheckpointError for a step that does not verify.
    """
    found = find_step(path, step)
    manifest = _read_verified(found, hash_files=hashes)
    report = {
        "step": manifest["step"],
        "path": os.fspath(found),
        "time": manifest["time"],
        "value": manifest["value"],
        "bytes": sum(size for _, size in manifest["files"].values()),
        "meta": manifest["meta"],
        "leaves": manifest["leaves"],
        "parts": _count_parts(manifest["leaves"]),
        "steps": [_summary(child) for child in _step_directories(found.parent)],
    }
    if hashes:
        report["hashes"] = {part: _content_hash(found, manifest, part) for part in report["parts"]}
    return report


def format_inspection(report: Mapping[str, Any]) -> str:
    """The report of `inspect` as text."""
    lines = [f"checkpoint {report['path']}  ({report['bytes'] / 1e6:.1f} MB)", ""]
    for name, value in report["meta"].items():
        lines.append(f"  {name}: {json.dumps(value)}")
    lines += ["", f"  {'part':<28}{'leaves':>8}{'entries':>16}{'MB':>10}  {'hash' if 'hashes' in report else ''}"]
    for part, (leaves, entries, size) in report["parts"].items():
        content = report.get("hashes", {}).get(part, "")
        lines.append(f"  {part:<28}{leaves:>8,}{entries:>16,}{size / 1e6:>10.1f}  {content}")
    lines += ["", f"  {'leaf':<60}{'dtype':>10}  shape"]
    lines += [f"  {path:<60}{dtype:>10}  {tuple(shape)}" for path, (shape, dtype) in report["leaves"].items()]
    lines += ["", f"  {'step':<12}{'sealed':>8}{'MB':>10}{'value':>12}"]
    for row in report["steps"]:
        value = "" if row["value"] is None else f"{row['value']:.5g}"
        lines.append(f"  {row['step']:<12}{'yes' if row['sealed'] else 'no':>8}{row['bytes'] / 1e6:>10.1f}{value:>12}")
    return "\n".join(line.rstrip() for line in lines)


def _summary(path: epath.Path) -> dict[str, Any]:
    manifest, problems = seal.read(path)
    size = sum(file.stat().length for file in seal.files(path).values())
    return {"step": int(path.name), "sealed": not problems, "bytes": size, "value": manifest.get("value")}


def _count_parts(leaves: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """`{part: (leaves, array entries, bytes)}`."""
    parts: dict[str, tuple[int, int, int]] = {}
    for path, (shape, dtype) in leaves.items():
        count, entries, size = parts.get(path.split("/")[0], (0, 0, 0))
        length = int(np.prod(shape, dtype=np.int64))
        parts[path.split("/")[0]] = (count + 1, entries + length, size + length * jax.numpy.dtype(dtype).itemsize)
    return parts


def _content_hash(path: epath.Path, manifest: Manifest, part: str) -> str:
    """Hash of path, dtype, shape and C-order bytes of each leaf of a part."""
    digest = hashlib.blake2b(digest_size=16)
    leaves = {name: leaf for name, leaf in manifest["leaves"].items() if name.split("/")[0] == part}
    abstract = {name: np.empty(shape, jax.numpy.dtype(dtype)) for name, (shape, dtype) in leaves.items()}
    arrays = _orbax().load(path, dict.fromkeys(manifest["leaves"], _orbax().PLACEHOLDER) | abstract)
    for name in sorted(leaves):
        digest.update(json.dumps([name, leaves[name]]).encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


# --- Trees ------------------------------------------------------------------------------------------------------------


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by path, `{"opt_state/0/mu/embed": leaf}`: the same for a tuple, a list, a dataclass or
    a dict with these names, so that a checkpoint does not depend on the classes that held its arrays."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    assert len(leaves) == len(pairs), "two leaves of the state have the same path"
    return leaves


def _shape_dtype(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]


def _load_tree(path: epath.Path, manifest: Manifest, abstract: Any, saved: Mapping[str, Any]) -> Any:
    """Load the leaves of `abstract`, which must be exactly `saved`, onto their shardings."""
    wanted = _by_path(abstract)
    _compare(path, saved, {name: _shape_dtype(leaf) for name, leaf in wanted.items()})
    request = dict.fromkeys(manifest["leaves"], _orbax().PLACEHOLDER) | {
        k: _with_sharding(v) for k, v in wanted.items()
    }
    try:
        with distributed.naming_lost_peers(f"checkpoint {path} was not loaded"):
            loaded = _orbax().load(path, request)
    except StallError:
        raise
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} verifies but cannot be loaded: {_one_line(error)}") from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in wanted])


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


# --- Directories ------------------------------------------------------------------------------------------------------


def _step_directories(directory: epath.Path) -> list[epath.Path]:
    """Step directories, sealed or not, in the order of their steps."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def _sealed_steps(directory: epath.Path) -> list[epath.Path]:
    return [path for path in _step_directories(directory) if seal.is_sealed(path)]


def _set_aside(path: epath.Path, why: str) -> epath.Path:
    return path.rename(path.parent / f"{path.name}.{why}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6}")


def _delete(path: epath.Path) -> None:
    """Unseal, then delete: a kill in between leaves an unfinished step, which the next save clears away."""
    (path / seal.MANIFEST).unlink(missing_ok=True)
    if path.exists():
        path.rmtree()


def _ever_sealed(directory: epath.Path) -> bool:
    return (directory / SEALED).exists() or any(directory.glob("*.corrupt-*"))


def _is_mine(name: str) -> bool:
    """Whether this process wrote a file of a step: Orbax puts `process_2` into the paths of what process 2 wrote."""
    writer = re.search(r"process_(\d+)", name)
    return distributed.process() == (int(writer[1]) if writer else 0)


def _check(path: epath.Path, hash_files: bool) -> tuple[Manifest, list[str]]:
    """`seal.check`, its hashing shared out among the processes; all of them get the same answer."""

    def share(name: str) -> bool:
        return zlib.crc32(name.encode()) % distributed.processes() == distributed.process()

    manifest, problems = seal.check(path, hash_files=hash_files, mine=share)
    found = distributed.gather("problems of a checkpoint", problems)
    return manifest, distributed.share("problems of a checkpoint", list(dict.fromkeys(itertools.chain(*found))))


def _read_verified(path: epath.Path, hash_files: bool) -> Manifest:
    manifest, problems = _check(path, hash_files)
    if problems:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {'; '.join(problems[:3])}; use another step or restore it from a backup"
        )
    return manifest
