"""A work directory: whose it is, who may write in it, and whether its run has ended."""

import contextlib
import dataclasses
import fnmatch
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from lmjax import config as configs
from lmjax.config import Config
from lmjax.errors import CheckpointError, ConfigError, StallError
from lmjax.process import group
from lmjax.record import files, seal, steps
from lmjax.record.ledger import check_ledger, read_ledger
from lmjax.record.tracking import read_events

_ORIGINS = ("train.init_from", "train.branch_from")
# A resumed run must mean the same run. How often it looks, saves and reports, and on what machine, may change.
_FIXED = (
    "task",
    "model.",
    "data.",
    "optimizer.",
    "train.steps",
    "train.batch",
    "train.seed",
    "train.average_decay",
    "train.loss.",
    *_ORIGINS,
)
_FREE = (
    "data.prefetch",
    "data.verify",
    "data.cache",
    "data.sources.*.prepare.workers",
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
    "tokenizer",
)
"""What a run writes over or into."""


# Whose it is ------------------------------------------------------------------------------------------------------


def locate(workdir: epath.PathLike) -> epath.Path:
    """The directory. Raises ConfigError for a bucket whose package is missing, and for a directory that is not a run's
    but has files under the names that a run writes: they are somebody's own."""
    path = epath.Path(workdir)
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


def with_pinned_start(workdir: epath.Path, cfg: Config) -> Config:
    """The config whose `train.init_from` names the step that this run's first attempt found, where it names none."""
    path, given = workdir / "config.json", cfg.train.init_from
    if not given or not path.exists():
        return cfg
    saved = configs.from_json(path).train.init_from
    if saved is None or saved.rpartition("@")[0] != os.fspath(files.locate(given)):
        return cfg
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, init_from=saved))


def check_unchanged(workdir: epath.Path, cfg: Config, *, allow: bool) -> None:
    """Raise ConfigError when `workdir` holds a run of another config.

    What a run that has a checkpoint started from is past: no flag allows to change it.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    changed = configs.differences(configs.from_json(path), cfg)
    if allow:
        started = steps.newest_sealed(workdir / "checkpoints") is not None
        changed = {key: values for key, values in changed.items() if key in _ORIGINS and started}
    if cfg.model.vocab is None:  # the saved config has it filled in from the data, which has its own check
        changed.pop("model.vocab", None)
    if changed := fixed(changed):
        shown = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in list(changed.items())[:5])
        raise ConfigError(
            f"{workdir} holds a run of another config: {shown}; use another --workdir, or --allow-config-change"
        )


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
                notice = f"another process trains in {workdir}; waiting up to {patience:.0f} s for it to end"
                free = stack.enter_context(files.lock(workdir / ".lock", patience, notice))
        if not group.broadcast("whether the work directory is free", free):
            raise StallError(f"another process trains in {workdir}; wait for it, stop it, or use another --workdir")
        yield


def make_workdir(workdir: epath.Path) -> None:
    """Raises CheckpointError when nothing can be written there, or not all processes see what one wrote: now, not at
    the first checkpoint."""
    probe = workdir / ".writable"
    with _writing(workdir):
        if group.is_leader():
            workdir.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
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
        raise CheckpointError(f"--workdir={workdir} is not writable ({error.strerror}); choose another") from None


# Its run ----------------------------------------------------------------------------------------------------------


def finished_step(workdir: epath.Path, *, hash_files: bool) -> int | None:
    """The last step of the run whose summary lies here, or None if it has none, or its newest checkpoint is damaged.

    Raises CheckpointError when that summary cannot be read, or there is no sealed checkpoint as new as it.
    """
    path = workdir / "summary.json"
    if not path.exists():
        return None
    try:
        step = int(json.loads(path.read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}); remove it, and the run goes on from its newest checkpoint"
        ) from error
    newest = steps.newest_sealed(workdir / "checkpoints")
    if newest is None or int(newest.name) < step:
        raise CheckpointError(
            f"{workdir} is finished after {step} steps, but its checkpoint of step {step} is gone; restore it from a "
            "backup, or remove summary.json, and the run goes on from the newest one"
        )
    return None if seal.check(newest, hash_files=hash_files)[1] else step


def next_attempt(workdir: epath.Path) -> int:
    """The number of the attempt that begins now: one above all that left a trace."""
    metrics, ledger = workdir / "metrics.jsonl", workdir / "ledger.jsonl"
    started = sum(event["event"] == "start" for event in read_events(metrics)) if metrics.exists() else 0
    recorded = max((entry.attempt + 1 for entry in read_ledger(ledger)), default=0) if ledger.exists() else 0
    return max(started, recorded)


def wandb_id(workdir: epath.Path, cfg: Config) -> str:
    """The id of the run in wandb: chosen once, before its first config is written, and kept in a file, so that every
    restart rejoins the run, whatever else changes.

    In an older directory it is the hash of the config of the attempt before.
    """
    path, config = workdir / "wandb_id", workdir / "config.json"
    if not path.exists():
        text = config.read_text() if config.exists() else configs.to_json(cfg)
        files.write_atomically(path, configs.hash_text(text, str(workdir)) + "\n")
    return path.read_text().strip()


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
