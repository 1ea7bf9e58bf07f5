"""A branch: a run whose first steps are those of another one, its trunk.

A trunk trains at a constant rate; branches go on from its checkpoints and decay, so that one trunk gives the losses of
many horizons (Hu et al. 2024, arXiv:2404.06395; Hägele et al. 2024, arXiv:2405.18392). A branch is, bit for bit, the
run that its config says: up to where it begins, both configs mean the same. Its work directory starts with the trunk's
past, checkpoint, metrics and ledger, and needs the trunk no more.
"""

import jax.numpy as jnp
import numpy as np
from etils import epath

from lmjax import config as configs
from lmjax.config import Config
from lmjax.errors import CheckpointError, ConfigError, one_line
from lmjax.optim.config import hyper
from lmjax.optim.optimizers import scheduled_rate
from lmjax.process import group
from lmjax.record import files, seal, steps
from lmjax.record.jsonl import JsonLines, read_lines
from lmjax.run import origin
from lmjax.run.workdir import fixed, identity, run_id, saved_config

SETTING = "train.branch_from"
OWN = ("train.steps", "optimizer.schedule.", SETTING)
"""Settings in which a branch may differ from its trunk."""


def begin(workdir: epath.Path, cfg: Config) -> None:
    """Give a work directory the past of the trunk that its config names, unless it has checkpoints already.

    The checkpoint comes last, and its seal after all of it: a kill before leaves a directory that begins again. Raises
    what `check` does, and CheckpointError when nothing can be written.
    """
    if cfg.train.branch_from is None:
        return
    if group.broadcast("whether it has begun", steps.ever_sealed(workdir / "checkpoints")):
        return
    trunk, step = check(cfg)
    if group.is_leader():
        try:
            _copy(trunk, step, workdir, cfg)
        except OSError as error:
            raise CheckpointError(f"storage: cannot write {workdir}: {one_line(error)}; free or mend it") from None
        print(f"branching from step {step} of {trunk}")
    group.barrier("the trunk's past")


def check(cfg: Config) -> tuple[epath.Path, int]:
    """The trunk's work directory, and the step at which the branch begins.

    Raises ConfigError for a trunk without that checkpoint, and as `check_same_until` does.
    """
    given = cfg.train.branch_from
    assert given is not None
    trunk, step = steps.parse_origin(SETTING, given)
    if step is None:
        raise ConfigError(f"{SETTING}={given}: say at which step, {given}@STEP")
    steps.origin_checkpoint(SETTING, given)
    pinned = origin.with_pinned_origins(cfg, saved_config(trunk), trunk)
    check_same_until(step, configs.from_json(trunk / "config.json"), pinned)
    return trunk, step


def check_same_until(step: int, theirs: Config, mine: Config) -> None:
    """Raise ConfigError unless both configs mean the same run up to a step, which is not the end of mine."""
    given = mine.train.branch_from
    if step >= mine.train.steps:
        raise ConfigError(f"{SETTING}={given} is not before the end, train.steps={mine.train.steps}; branch earlier")
    changed = fixed(configs.differences(theirs, mine))
    if mine.model.vocab is None:  # theirs is filled in from the data, which have a check of their own
        changed.pop("model.vocab", None)
    for key, (there, here) in changed.items():
        if not key.startswith(OWN):
            raise ConfigError(f"{SETTING}={given}: {key} is {there!r} there and {here!r} here; leave it as it is there")
    there, here = (learning_rates(cfg, step) for cfg in (theirs, mine))
    different = np.flatnonzero(there != here)
    if different.size:
        first = int(different[0])
        raise ConfigError(
            f"{SETTING}={given}: update {first} has the learning rate {there[first]:.4g} there and {here[first]:.4g} "
            f"here, so it is not the same run up to there; branch at step {first} at most, or change train.steps or "
            "optimizer.schedule"
        )


def learning_rates(cfg: Config, step: int) -> np.ndarray:
    """The learning rates of the first `step` updates, float32 [step]."""
    rate, scalars = scheduled_rate(cfg.optimizer), hyper(cfg.optimizer, steps=cfg.train.steps)
    return np.asarray(rate(jnp.arange(step), scalars))


# Its past ---------------------------------------------------------------------------------------------------------


def _copy(trunk: epath.Path, step: int, workdir: epath.Path, cfg: Config) -> None:
    """Config, metrics and ledger up to the step, then the checkpoint. Raises CheckpointError for a damaged one."""
    configs.write_json(workdir / "config.json", cfg)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        _copy_past(trunk / name, workdir / name, step)
    saved, target = trunk / "checkpoints" / str(step), workdir / "checkpoints" / str(step)
    if problems := seal.copy(saved, target, {"run": run_id(workdir, cfg), "identity": identity(cfg)}):
        raise CheckpointError(f"checkpoint {saved} is damaged: {problems[0]}; branch from another step")
    files.write_atomically(workdir / "checkpoints" / steps.SEALED, f"first sealed step: {step}, of {trunk}\n")


def _copy_past(source: epath.Path, target: epath.Path, step: int) -> None:
    """The lines up to a step; of what the trunk said of its end nothing holds here."""
    target.unlink(missing_ok=True)
    lines = JsonLines(target)
    for line in read_lines(source):
        if line.get("event", "start") == "start" and line.get("rollback", line).get("step", 0) <= step:
            lines.write(line)
    lines.close()
