"""Where the weights that a run started or learns from lie: pinned at its first start, and perhaps moved since."""

import dataclasses
import logging
import os

from etils import epath

from lmjax.config import Config
from lmjax.errors import CheckpointError, DataError
from lmjax.record import files
from lmjax.record.tracking import read_events
from lmjax.tasks.start import digest

logger = logging.getLogger(__name__)


def with_pinned_origins(cfg: Config, saved: Config | None, workdir: epath.Path) -> Config:
    """The config whose `train.init_from` and `train.distill.teacher` name the step, or the hash, that the first attempt
    of the run in `workdir` found and `saved` as its config."""
    if saved is None:
        return cfg
    train, before = cfg.train, saved.train
    if train.init_from and before.init_from:
        pinned = _pinned(train.init_from, before.init_from)
        if pinned == train.init_from:
            pinned = _pinned_elsewhere(workdir, pinned, before.init_from)
        train = dataclasses.replace(train, init_from=pinned)
    if train.distill and train.distill.teacher and before.distill:
        teacher = _pinned(train.distill.teacher, before.distill.teacher)
        train = dataclasses.replace(train, distill=dataclasses.replace(train.distill, teacher=teacher))
    return dataclasses.replace(cfg, train=train)


def _pinned(given: str, saved: str) -> str:
    return saved if saved.rpartition("@")[0] == os.fspath(files.locate(given)) else given


def _pinned_elsewhere(workdir: epath.Path, given: str, saved: str) -> str:
    """The step that the run began with, where the other run has been moved, and perhaps trained on since."""
    step = saved.rpartition("@")[2]
    moved = f"{files.locate(given)}@{step}"
    return moved if step.isdigit() and _began_with(workdir, moved) else given


def is_same_start(workdir: epath.Path, cfg: Config) -> bool:
    """Whether the weights that the config names are those that the run's last attempt says it started from."""
    return cfg.train.init_from is not None and _began_with(workdir, cfg.train.init_from)


def _began_with(workdir: epath.Path, init_from: str) -> bool:
    try:
        begun = [event.get("start") for event in read_events(workdir / "metrics.jsonl") if event["event"] == "start"]
    except (OSError, DataError):
        return False
    return begun[-1:] == [digest(init_from)] != [None]


def with_found_start(workdir: epath.Path, cfg: Config) -> Config:
    """The config of a run that needs the weights that it stands on, naming them where they lie now: where it says or,
    if nothing is there, under the same name beside the work directory. Whether they are the same, their hash says.

    Raises CheckpointError where they are in neither place.
    """
    named = cfg.train.init_from
    if named is None or digest(named) is not None:
        return cfg
    place, _, pin = named.rpartition("@")
    beside = workdir.parent / epath.Path(place).name
    if digest(f"{beside}@{pin}") is None:
        raise CheckpointError(
            f"{workdir} stands on the weights of {named}, which are not there any more, nor in {beside}; put them back"
        )
    logger.warning("%s stands on the weights of %s, which are read from %s", workdir, named, beside)
    return _starting_from(cfg, f"{beside}@{pin}")


def _starting_from(cfg: Config, init_from: str) -> Config:
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, init_from=init_from))
