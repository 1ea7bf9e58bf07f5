"""A work directory: whose it is, who may write in it, and whether its run has ended."""

import contextlib
import fnmatch
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from lmjax import config as configs
from lmjax.config import Config
from lmjax.data.store.manifest import read_manifest
from lmjax.errors import CheckpointError, ConfigError, DataError, StallError
from lmjax.process import ending, group
from lmjax.record import files, formats, seal, steps
from lmjax.record.lease import Lease
from lmjax.record.ledger import check_ledger, read_ledger
from lmjax.record.tracking import read_events
from lmjax.run import origin

logger = logging.getLogger(__name__)

SUMMARY_FORMAT = 1
_LOCATION = re.compile(r"data\.sources\.[^.]+\.(path|prepare\.inputs)")
"""Settings that say where data lie, not what they are."""
_SEALED = ".sealed"
_BUCKET_NOTE = (
    "note: {} is in a bucket: no lock keeps a second run out (it takes over, and this one ends with 6 half a minute "
    "later), and metrics and ledger are uploaded with each checkpoint, not line by line"
)
_ORIGINS = ("train.init_from", "train.branch_from")
# A resumed run must mean the same run. How often it looks, saves and reports, and on what machine, may change.
_FIXED = (
    "task",
    "model.",
    "data.",
    "optimizer.",
    "tune.",
    "train.steps",
    "train.batch",
    "train.seed",
    "train.skip_spikes",
    "train.average_decay",
    "train.loss.",
    *(f"train.distill.{name}" for name in ("teacher", "divergence", "temperature", "share")),
    *_ORIGINS,
)
_FREE = (
    "data.prefetch",
    "data.verify",
    "data.cache",
    "data.sources.*.prepare.workers",
    "data.sources.*.prepare.document_bytes",
    "model.attention",
    "model.remat",
    "model.unroll",
    "train.loss.chunk",
)

_WRITTEN = (
    "config.json",
    "metrics.jsonl",
    "ledger.jsonl",
    "summary.json",
    "report.md",
    "loss.png",
    "checkpoints",
    "samples",
    "batches",
    "tokenizer",
)
"""What a run writes over or into."""


# Whose it is ------------------------------------------------------------------------------------------------------


def locate(workdir: epath.PathLike) -> epath.Path:
    """The directory. Raises ConfigError for a bucket whose package is missing, and for a directory that is not a run's
    but has files under the names that a run writes: they are somebody's own."""
    path = epath.Path(workdir)
    files.check_takes_checkpoints(path, "--workdir")
    try:
        found = [name for name in _WRITTEN if (path / name).exists()]
    except ImportError as error:
        raise ConfigError(f"--workdir={workdir}: {error}; see the extras in the README, or use a local path") from error
    if found and not _is_ours(path):
        raise ConfigError(
            f"--workdir={workdir} is not the work directory of a run, and has a {found[0]} of its own; choose another, "
            "or move that away"
        )
    return path


def _is_ours(workdir: epath.Path) -> bool:
    """Whether a run has begun here: it writes its config before anything else, and SEALED stays."""
    if (workdir / "checkpoints" / steps.SEALED).exists():
        return True
    try:
        tree = json.loads((workdir / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and {"model", "data", "optimizer", "train"} <= tree.keys()


def check_agreed(cfg: Config) -> None:
    """Raise ConfigError unless this process was started with the config of process 0."""
    theirs = configs.parse(json.loads(group.broadcast("the config", configs.to_json(cfg))))
    if differing := configs.differences(theirs, cfg):
        key, (there, here) = next(iter(differing.items()))
        raise ConfigError(f"{key} is {here!r} here, but {there!r} at process 0; start all with the same command")


def check_unchanged(workdir: epath.Path, cfg: Config, *, allow: bool) -> None:
    """Raise ConfigError when `workdir` holds a run of another config.

    What a run that has a checkpoint started from is past: no flag allows to change it. Its data, and the weights that
    it started from, may have been moved: fingerprints say whether they are the same. Where config.json is gone or
    damaged, the seals say whether the config is the same, and it is written again.
    """
    saved = saved_config(workdir)
    if saved is None:
        _check_same_as_sealed(workdir, cfg, allow=allow)
        return
    changed = configs.differences(saved, cfg)
    if "train.init_from" in changed and origin.is_same_start(workdir, cfg):
        del changed["train.init_from"]
    if allow:
        started = steps.newest_sealed(workdir / "checkpoints") is not None
        changed = {key: values for key, values in changed.items() if key in _ORIGINS and started}
    if any(map(_LOCATION.fullmatch, changed)) and _has_same_data(workdir, cfg):
        changed = {key: values for key, values in changed.items() if not _LOCATION.fullmatch(key)}
    if cfg.model.vocab is None:  # the saved config has it filled in from the data, which has its own check
        changed.pop("model.vocab", None)
    if changed := fixed(changed):
        shown = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in list(changed.items())[:5])
        raise ConfigError(
            f"{workdir} holds a run of another config: {shown}; use another --workdir, or --allow-config-change"
        )


def saved_config(workdir: epath.Path) -> Config | None:
    """The config of the run that lies here; None where there is none, or it is damaged and a checkpoint can tell."""
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        return configs.from_json(path)
    except configs.DamagedConfigError as error:
        if _sealed_digest(workdir) is None:
            raise
        logger.warning("%s", error)
        return None


def _has_same_data(workdir: epath.Path, cfg: Config) -> bool:
    """Whether the data sets that the config names are those that the run's last attempt began with."""
    try:
        begun = [event["data"] for event in read_events(workdir / "metrics.jsonl") if event["event"] == "start"]
        found = {name: read_manifest(files.locate(source.path)) for name, source in cfg.data.sources.items()}
    except (OSError, KeyError, DataError):
        return False
    return begun[-1:] == [{name: manifest.fingerprint for name, manifest in found.items()}]


def _check_same_as_sealed(workdir: epath.Path, cfg: Config, *, allow: bool) -> None:
    sealed = _sealed_digest(workdir)
    if sealed is not None and sealed != identity(cfg) and not allow:
        raise ConfigError(
            f"{workdir} holds checkpoints of another config, and no readable config.json to say what differs; restore "
            "that, or use the command of that run, another --workdir, or --allow-config-change"
        )


def _sealed_digest(workdir: epath.Path) -> str | None:
    """`identity` of the config that the newest step was saved with; older checkpoints do not have it."""
    metas = steps.sealed_metas(workdir)
    return metas[max(metas)].get("identity") if metas else None


def identity(cfg: Config) -> str:
    """A short hash of the settings that make it another run when they change, but for those that are told otherwise:
    where it started is past, the vocabulary may be filled in from the data, which have fingerprints of their own."""
    kept = fixed({key: (None, value) for key, value in configs.settings(cfg).items()})
    apart = (*_ORIGINS, "model.vocab")
    told = {key: value for key, (_, value) in kept.items() if key not in apart and not _LOCATION.fullmatch(key)}
    return configs.hash_text(json.dumps(told, sort_keys=True))


def fixed(differences: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """The differences, as `config.differences` finds them, that make it another run."""
    free = re.compile("|".join(map(fnmatch.translate, _FREE)))
    return {key: values for key, values in differences.items() if key.startswith(_FIXED) and not free.match(key)}


# Who may write ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(workdir: epath.Path, patience: float = 120.0) -> Iterator[None]:
    """Keeps a second run out of `workdir`; the lock of a run that dies goes with it.

    Buckets, and file systems without locks, keep nobody out. Raises StallError when another run is still there after
    `patience` seconds, and CheckpointError when nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        free = True
        if group.is_leader():
            with _writing(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                if files.is_remote(workdir):
                    print(_BUCKET_NOTE.format(workdir), flush=True)
                notice = f"another process trains in {workdir}; waiting up to {patience:.0f} s for it to end"
                free = stack.enter_context(files.lock(workdir / ".lock", patience, notice))
        if not group.broadcast("whether the work directory is free", free):
            raise StallError(f"another process trains in {workdir}; wait for it, stop it, or use another --workdir")
        yield


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[Lease]:
    """Leave to write there, until the attempt ends. If it ends because others are gone or stuck, they are given up: the
    lease goes, and the last line names the step to go on from."""
    with _writing(workdir):
        lease = Lease(workdir)

    def give_up() -> str:
        lease.revoke()
        last = steps.newest_sealed(workdir / "checkpoints")
        return "; no step is sealed yet" if last is None else f"; the last good step is {last.name}"

    with ending.last_word(give_up):
        yield lease


def make_workdir(workdir: epath.Path) -> None:
    """Raises CheckpointError when nothing can be written there, or not all processes see what one wrote: now, not at
    the first checkpoint."""
    probe = workdir / ".writable"
    with _writing(workdir):
        if group.is_leader():
            workdir.mkdir(parents=True, exist_ok=True)
            files.write_atomically(probe, b"")
        group.barrier("the work directory")
        if not probe.exists():
            raise CheckpointError(
                f"--workdir={workdir} is not the one of process 0; choose one that all processes share"
            )
        group.barrier("the work directory")
        if group.is_leader():
            probe.unlink()


@contextlib.contextmanager
def _writing(workdir: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = "" if error.filename in (None, os.fspath(workdir)) else f": {epath.Path(error.filename).name}"
        why = f"{error.strerror}{where}"
        raise CheckpointError(f"--workdir={workdir} is not writable ({why}); choose another") from None


# Its run ----------------------------------------------------------------------------------------------------------


def finished_step(workdir: epath.Path, *, hash_files: bool) -> int | None:
    """The last step of the run that has ended here, with the checkpoint that proves it; None if there is none, or what
    is missing or damaged of it has to be made again: the summary, the config, the last steps themselves.

    Raises CheckpointError when no checkpoint is left to go on from, or the newest one is of another run.
    """
    path, newest = workdir / "summary.json", steps.newest_sealed(workdir / "checkpoints")
    if not path.exists():
        return None
    if newest is None:
        raise CheckpointError(
            f"{path} says that this run is finished, but there is no sealed checkpoint in {workdir / 'checkpoints'}; "
            "restore one from a backup, or remove the work directory to start again from step 0"
        )
    step = summary_step(path)
    if step is None or saved_config(workdir) is None:
        return None
    if int(newest.name) < step:
        logger.warning(
            "%s is finished after %d steps, but that checkpoint is gone; going on from the newest", workdir, step
        )
        return None
    manifest, problems = seal.check(newest, hash_files=hash_files)
    if not problems and steps.is_foreign(newest, manifest):
        steps.refuse_foreign(newest)
    return None if problems else step


def summary_step(path: epath.Path) -> int | None:
    """The step of a summary; None, with a warning, if it is damaged. Raises CheckpointError for a later format."""
    try:
        summary = json.loads(path.read_text())
        formats.unstamped(summary, path, SUMMARY_FORMAT, CheckpointError)
        return int(summary["step"])
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        logger.warning("%s is damaged (%s); it is made again from the newest checkpoint", path, type(error).__name__)
        return None


def has_report(workdir: epath.Path) -> bool:
    """Whether report and plot are there: a kill or a full disk may have come between."""
    found = all(path.exists() and path.stat().length for path in (workdir / "report.md", workdir / "loss.png"))
    return group.broadcast("whether there is a report", found)


def note_sealed(workdir: epath.Path) -> None:
    """Keep outside of checkpoints/ that there is one. Raises CheckpointError when nothing can be written."""
    path = workdir / _SEALED
    if not path.exists():
        with _writing(workdir):
            path.write_text("a step of this run was sealed\n")


def check_not_lost(workdir: epath.Path) -> None:
    """Raise CheckpointError when all that was sealed is gone: no run starts from step 0 again without a word."""
    if (workdir / _SEALED).exists() and steps.newest_sealed(workdir / "checkpoints") is None:
        raise CheckpointError(
            f"{workdir / 'checkpoints'}: checkpoints were sealed here, but none is left; restore one from a backup, or "
            "remove the work directory to start again from step 0"
        )


def next_attempt(workdir: epath.Path) -> int:
    """The number of the attempt that begins now: one above all that left a trace."""
    metrics, ledger = workdir / "metrics.jsonl", workdir / "ledger.jsonl"
    started = sum(event["event"] == "start" for event in read_events(metrics)) if metrics.exists() else 0
    recorded = max((entry.attempt + 1 for entry in read_ledger(ledger)), default=0) if ledger.exists() else 0
    return max(started, recorded)


def run_id(workdir: epath.Path, cfg: Config) -> str:
    """The id of the run, also in wandb: chosen once, before its first config is written, and kept in a file and in
    every checkpoint, so that every restart rejoins the run, whatever else changes, and no other run's steps are taken
    for its own.

    In an older directory it is the hash of the config of the attempt before. Raises what `steps.run_of` does.
    """
    path, found = workdir / steps.RUN_ID, steps.run_of(workdir)
    if found is None:
        found = configs.hash_text(configs.to_json(saved_config(workdir) or cfg), str(workdir))
    if not path.exists() or path.read_bytes().strip() != found.encode():
        files.write_atomically(path, found + "\n")
    return found


def verify(path: epath.Path) -> list[str]:
    """What is wrong with the sealed checkpoints of a run, or with what its ledger says that they read; empty if all is
    well. Raises CheckpointError when there is nothing to verify."""
    problems = steps.verify(path)
    metas = steps.sealed_metas(path)
    sealed = {step: meta["data"]["next_sample"] for step, meta in metas.items() if "data" in meta}
    if (path / "ledger.jsonl").exists():
        problems += check_ledger(path / "ledger.jsonl", sealed)
    elif sealed:
        problems.append(f"ledger.jsonl is missing, though {len(sealed)} checkpoints of training are sealed")
    return problems
