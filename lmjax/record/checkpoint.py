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
import itertools
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from lmjax.errors import CheckpointError, StallError, one_line
from lmjax.process import group
from lmjax.process.faults import fault
from lmjax.record import files, seal
from lmjax.record.apart import apart
from lmjax.record.config import CheckpointConfig
from lmjax.record.seal import Manifest
from lmjax.record.steps import (
    SEALED,
    check,
    delete,
    ever_sealed,
    find_step,
    newest_sealed,
    read_verified,
    set_aside,
    step_directories,
)
from lmjax.record.trees import (
    ORBAX_TURN,
    count_parts,
    leaves_by_path,
    load_tree,
    orbax,
    shape_dtype,
    uncompressed,
)

logger = logging.getLogger(__name__)
_CLEARINGS = 10


class Checkpoints:
    """The checkpoints of one run. All processes of a run call every method together; one run writes a directory."""

    def __init__(
        self, directory: epath.PathLike, cfg: CheckpointConfig, may_write: Callable[[], None] = lambda: None
    ) -> None:
        """`may_write` raises StallError once nothing is to be written any more."""
        self._may_write = may_write
        self.directory = files.absolute(directory)
        self.last_step: int | None = None
        """The step last saved or restored by this object."""
        self.sealed_step: int | None = None
        """The step last sealed and verified by this object, or restored."""
        self._cfg = cfg
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "lmjax-checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def save(
        self, step: int, state: Any, meta: Mapping[str, Any], *, value: float | None = None, context: Any = None
    ) -> None:
        """Save a pytree of jax arrays with its JSON `meta`; writing, hashing and sealing go on in the background.

        The arrays may be donated as soon as this returns. One save is in flight at a time: a second one first waits
        for it, and for the files of other runs that save in this process. `value` (lower is better) serves
        `keep_best`. Existing steps from `step` on belong to a branch that training went back behind; they are set
        aside, never kept in place of the new ones. `context` is Orbax's, by default `trees.uncompressed`. Raises
        CheckpointError for a failure of this save or of the one before.
        """
        self.wait()
        self._may_write()
        leaves = leaves_by_path(state)
        manifest = {
            "step": step,
            "time": time.time(),
            "value": float(value) if value is not None and np.isfinite(value) else None,
            "meta": dict(meta),
            "leaves": {path: shape_dtype(leaf) for path, leaf in leaves.items()},
        }
        path = self.directory / str(step)
        with contextlib.ExitStack() as turn:
            turn.enter_context(ORBAX_TURN)
            try:
                if group.is_leader():
                    self.directory.mkdir(parents=True, exist_ok=True)
                    self._clear_from(step)
                with group.naming_lost_peers(f"checkpoint {path} was not saved"), context or uncompressed():
                    response = orbax().save_async(path, apart(leaves))  # which waits for process 0
            except StallError:
                raise
            except Exception as error:
                raise self._failed(path, manifest, error) from error
            self.last_step = step
            held = turn.pop_all()
            try:
                self._pending = self._worker.submit(self._finish, path, response, manifest, held)
            except BaseException:
                held.close()
                raise

    def poll(self) -> None:
        """Raise the CheckpointError of a background save that has failed; never blocks."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Block until the last save is sealed and verified. Raises CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(
        self, abstract_state: Any, *, step: int | None = None, unread: tuple[str, ...] = ()
    ) -> tuple[Any, dict[str, Any], int] | None:
        """`(state, meta, step)` of the newest good step (or of `step`), or None if none was ever sealed.

        `abstract_state` has a `jax.ShapeDtypeStruct` with a sharding at every leaf, and the state comes back in that
        structure; the top-level parts named in `unread` come back as they are in `abstract_state`, whatever was saved.
        A damaged step is renamed and the one before is used, unless `step` names it. Raises CheckpointError
        for a tree that differs in any path, shape or dtype, and when every sealed step is damaged or gone.
        """
        self.wait()
        if step is not None:
            path = find_step(self.directory, step)
            manifest = read_verified(path, self._cfg.verify)
            return self._load(path, manifest, abstract_state, unread)
        self._warn_of_unsealed()
        while (newest := self._newest_sealed()) is not None:
            manifest, problems = check(newest, self._cfg.verify)
            if not problems:
                return self._load(newest, manifest, abstract_state, unread)
            if group.is_leader():
                aside = set_aside(newest, "corrupt")
                logger.warning("checkpoint %s is damaged (%s); moved to %s", newest, problems[0], aside.name)
        if group.broadcast("whether steps were ever sealed", ever_sealed(self.directory)):
            raise CheckpointError(
                f"{self.directory}: checkpoints were sealed here, but none verifies now; restore one from a backup, "
                "or remove the directory to start again from step 0"
            )
        return None

    def _warn_of_unsealed(self) -> None:
        newest_first = reversed(step_directories(self.directory))
        for path in itertools.takewhile(lambda path: not seal.is_sealed(path), newest_first):
            if group.is_leader():
                logger.warning("checkpoint %s was never sealed; it is skipped", path)

    def _newest_sealed(self) -> epath.Path | None:
        """The directory of the newest sealed step, as process 0 finds it."""
        newest = newest_sealed(self.directory)
        name = group.broadcast("the newest sealed step", None if newest is None else newest.name)
        return None if name is None else self.directory / name

    def _load(
        self, path: epath.Path, manifest: Manifest, abstract: Any, unread: tuple[str, ...]
    ) -> tuple[Any, dict[str, Any], int]:
        saved = {name: leaf for name, leaf in manifest["leaves"].items() if name.split("/")[0] not in unread}
        state = load_tree(path, manifest, abstract, saved=saved, unread=unread)
        self.last_step = self.sealed_step = manifest["step"]
        return state, manifest["meta"], manifest["step"]

    def _finish(self, path: epath.Path, response: Any, manifest: Manifest, turn: contextlib.ExitStack) -> None:
        """Seal, verify, then delete what is no longer kept. Runs in the background; ends the turn at Orbax."""
        try:
            with group.naming_lost_peers(f"checkpoint {path} was not sealed"):
                with turn:
                    try:
                        fault("checkpoint.write")
                    finally:
                        response.result()  # it must have stopped writing before its files are cleared away
                fault("checkpoint.before_seal")
                self._may_write()
                self._seal(path, manifest)
                fault("checkpoint.after_seal")
                group.barrier("the seal")
                read_verified(path, self._cfg.verify)
                self.sealed_step = manifest["step"]
        except StallError:
            raise
        except Exception as error:
            raise self._failed(path, manifest, error) from error
        try:
            if group.is_leader():
                self._retain()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path} is sealed, but an older one could not be deleted: {one_line(error, 300)}"
            ) from error

    def _seal(self, path: epath.Path, manifest: Manifest) -> None:
        """Each process hashes the files that it wrote; process 0 writes the seal."""
        hashes = group.gather("hashes of a checkpoint", seal.hash_files(path, _is_mine))
        if group.is_leader():
            seal.write(path, manifest, {name: entry for part in hashes for name, entry in part.items()})
            if not (self.directory / SEALED).exists():
                files.write_atomically(self.directory / SEALED, f"first sealed step: {manifest['step']}\n")

    def _failed(self, path: epath.Path, manifest: Manifest, error: Exception) -> CheckpointError:
        """What a save raises that failed, its files gone: they would keep a full disk full."""
        alone = group.processes() == 1  # others may be writing still: then the next save clears up
        if alone and not files.is_remote(path):
            for _ in range(_CLEARINGS):  # TensorStore's threads go on for a moment, and make directories anew
                with contextlib.suppress(OSError):
                    delete(path)
                    self._delete_unfinished()
                time.sleep(0.02)
        return _failure(path, manifest, error)

    def _clear_from(self, step: int) -> None:
        self._delete_unfinished()
        for path in step_directories(self.directory):
            if int(path.name) >= step and seal.is_sealed(path):
                aside = set_aside(path, "abandoned")
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
        for path in step_directories(self.directory):
            if seal.is_sealed(path):
                values[int(path.name)] = seal.read(path)[0].get("value")
            else:
                path.rmtree()
        for step in values.keys() - self._kept(values):
            delete(self.directory / str(step))

    def _kept(self, values: Mapping[int, float | None]) -> set[int]:
        steps = sorted(values)
        best = sorted((value, step) for step, value in values.items() if value is not None)
        forever = (step for step in steps if self._cfg.keep_every and step % self._cfg.keep_every == 0)
        return {*steps[-self._cfg.keep_last :], *forever, *(step for _, step in best[: self._cfg.keep_best])}


def _failure(path: epath.Path, manifest: Manifest, error: Exception) -> CheckpointError:
    need = files.in_words(sum(size for _, _, size in count_parts(manifest["leaves"]).values()))
    local = not files.is_remote(path) and path.parent.exists()
    free = f", {files.in_words(shutil.disk_usage(path.parent).free)} free" if local else ""
    return CheckpointError(
        f"checkpoint {path} was not saved: {_reason(error)} (it needs up to {need}{free}); "
        "free or mend the storage and run again"
    )


def _reason(error: Exception) -> str:
    """What the system said, where it is the storage that failed: TensorStore's own words are long, and hide it."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\[os_error_code='(\d+)'", str(error))):
        number = int(found[1])
    return os.strerror(number) if number else one_line(error, 300)


def restore_parts(
    path: epath.PathLike, parts: Mapping[str, Any], *, step: int | None = None, whole: bool = True
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """`(parts, meta, step)`: top-level parts of a saved state, as in `restore_parts(workdir, {"params": abstract})`.

    `path` is as in `find_step`. The parts are those saved, leaf by leaf, or some of their leaves if not `whole`.
    Nothing is renamed: a damaged or different checkpoint is a CheckpointError, because a number that is reported must
    not silently come from another step.
    """
    found = find_step(path, step)
    manifest = read_verified(found, hash_files=True)
    saved = {name: leaf for name, leaf in manifest["leaves"].items() if name.split("/")[0] in parts}
    if not whole:
        wanted = leaves_by_path(dict(parts))
        saved = {name: leaf for name, leaf in saved.items() if name in wanted}
    return load_tree(found, manifest, dict(parts), saved=saved), manifest["meta"], manifest["step"]


def restore_weights(
    path: epath.PathLike, abstract: Any, *, step: int | None = None, whole: bool = True
) -> tuple[Any, dict[str, Any], int]:
    """`(weights, meta, step)`: the weights that a checkpoint delivers, the average where its run kept one.

    Raises as above.
    """
    found = find_step(path, step)
    part = weights_part(seal.read(found)[0])
    parts, meta, number = restore_parts(found, {part: abstract}, whole=whole)
    return parts[part], meta, number


def weights_part(manifest: Manifest) -> str:
    """The part of a saved state that holds the weights which it delivers (train/state.py)."""
    return "average" if any(name.startswith("average/") for name in manifest.get("leaves", {})) else "params"


def _is_mine(name: str) -> bool:
    """Whether this process wrote a file of a step: Orbax puts `process_2` into the paths of what process 2 wrote."""
    writer = re.search(r"process_(\d+)", name)
    return group.process() == (int(writer[1]) if writer else 0)
