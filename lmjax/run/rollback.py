"""Going back to an earlier checkpoint, past samples that did harm.

    lmjax rollback runs/mine --to=800 --skip-samples=4096      then the train command as before

The ledger says so in a line of its own, and from there on the samples that are left out are part of the run: every
attempt that starts from that checkpoint leaves out the same, and the checkpoints after it name them. What was trained
before after that step stays beside, as `1000.abandoned-...`.
"""

from typing import Any

from etils import epath

from lmjax.errors import CheckpointError, ConfigError
from lmjax.process import group
from lmjax.process.faults import fault
from lmjax.record import steps
from lmjax.record.ledger import Ledger, Rollback, effective_rollbacks
from lmjax.record.tracking import JsonlTracker
from lmjax.run.workdir import lock


def roll_back(workdir: epath.PathLike, to: int, skip: int) -> list[str]:
    """Set aside what came after step `to`, and leave out the `skip` samples that follow it; the names of what was.

    Raises StallError while the run trains, ConfigError for a directory that is not a run's, and CheckpointError for a
    step that is not sealed or does not verify.
    """
    workdir = epath.Path(workdir)
    if not (workdir / "checkpoints").is_dir() or not (workdir / "ledger.jsonl").exists():
        raise ConfigError(f"{workdir} is not the work directory of a run that was trained here")
    with lock(workdir, patience=0):
        kept = steps.find_step(workdir / "checkpoints", to)
        manifest = steps.read_verified(kept, hash_files=True)
        first = manifest["meta"]["data"]["next_sample"]
        ledger, metrics = Ledger(workdir / "ledger.jsonl"), JsonlTracker(workdir / "metrics.jsonl")
        aside = []
        if (workdir / "summary.json").exists():
            aside.append(steps.set_aside(workdir / "summary.json", "abandoned").name)
        # The newest first: a kill in between leaves a run that goes on from the newest of those that are left.
        for step in reversed(steps.sealed_steps(workdir / "checkpoints")):
            if int(step.name) > to:
                aside.append(steps.set_aside(step, "abandoned").name)
                fault("rollback.aside")
        metrics.roll_back(to, {"first_sample": first, "skip": skip})
        metrics.sync()
        ledger.roll_back(Rollback(to, first, skip))
        ledger.sync()
    return aside


def resumed(workdir: epath.Path, meta: dict[str, Any], step: int) -> dict[str, Any]:
    """What a checkpoint kept, as an attempt goes on from it: behind the samples that a rollback to its step leaves out.

    Raises CheckpointError for a checkpoint from before a rollback, whose own is gone: the steps up to there would be
    done again without leaving out what was to be left out.
    """
    found = effective_rollbacks(workdir / "ledger.jsonl") if group.is_leader() else []
    last = group.broadcast("the last rollback", [(one.step, one.first_sample, one.skip) for one in found[-1:]])
    rollback = Rollback(*last[0]) if last else None
    if rollback is None or rollback.step < step or rollback.skip == 0:
        return meta
    if rollback.step > step:
        raise CheckpointError(
            f"{workdir} was rolled back to step {rollback.step}, whose checkpoint is gone; restore it from a backup, "
            f"or roll back again: lmjax rollback {workdir} --to={step}"
        )
    data = {**meta["data"], "next_sample": meta["data"]["next_sample"] + rollback.skip}
    left_out = [*meta.get("left_out", []), [rollback.first_sample, rollback.skip]]
    counts = {"counts": {**meta["counts"], "samples": data["next_sample"]}} if "counts" in meta else {}
    return {**meta, "data": data, "left_out": left_out, **counts}
