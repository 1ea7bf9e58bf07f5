"""The train command: start or resume, train, evaluate, sample, save, report."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lmjax import config as configs
from lmjax.config import Config
from lmjax.devices.place import local_rows, on_one_device
from lmjax.errors import DONE, PREEMPTED, ConfigError, DataError, NumericalError, StallError, one_line
from lmjax.process import group
from lmjax.process.faults import fault
from lmjax.process.signals import Preemption, Watchdog
from lmjax.record.checkpoint import Checkpoints
from lmjax.record.report import write_report
from lmjax.record.tracking import Status
from lmjax.run import assemble, branch, feed
from lmjax.run.assemble import Experiment
from lmjax.run.progress import Progress
from lmjax.run.records import Records
from lmjax.run.workdir import (
    check_unchanged,
    finished_step,
    locate,
    lock,
    make_workdir,
    next_attempt,
    with_pinned_start,
)
from lmjax.tasks.registry import TASKS
from lmjax.tasks.task import Task
from lmjax.train.loop import Periodic, Reader, train
from lmjax.train.state import TrainState
from lmjax.train.step import Step

logger = logging.getLogger(__name__)


class Options(NamedTuple):
    """What the command line says beside the config."""

    profile: tuple[int, int] | None = None
    """First and last step of a profiler trace."""
    allow_config_change: bool = False
    allow_data_change: bool = False
    command: str = ""


class Means(NamedTuple):
    """What a run trains by: of its own where it is alone, shared where many train together."""

    preemption: Preemption
    watchdog: Watchdog
    step: Step


@contextlib.contextmanager
def alone(experiment: Experiment) -> Iterator[Means]:
    with Preemption() as preemption, Watchdog(experiment.cfg.train.step_timeout) as watchdog:
        yield Means(preemption, watchdog, assemble.compiled_step(experiment))


def run(
    cfg: Config,
    workdir: epath.PathLike,
    options: Options,
    make_task: Callable[[Config], Task] | None = None,
    means: Callable[[Experiment], contextlib.AbstractContextManager[Means]] = alone,
) -> int:
    """Train, or go on training, in `workdir`; returns the exit code. A finished run is left as it is.

    `make_task` makes of the config what is trained (default: the one that the config names). DONE means that the last
    checkpoint verifies and that summary and report are there, on every call.
    """
    workdir = locate(workdir)
    check_agreed(cfg)
    cfg = with_pinned_start(workdir, cfg)
    if is_finished(workdir, cfg, options) and has_report(workdir):
        return say_finished(workdir)
    with lock(workdir):
        if is_finished(workdir, cfg, options):  # by the run that was waited for, or by one that died over its report
            if not has_report(workdir) and group.leads():
                write_report(workdir, defaults=dataclasses.asdict(Config()))
            return say_finished(workdir)
        make_workdir(workdir)
        check_unchanged(workdir, cfg, allow=options.allow_config_change)
        branch.begin(workdir, cfg)
        task = (make_task or TASKS[cfg.task].task)(cfg)
        experiment = assemble.assemble(task)
        with means(experiment) as given:
            return Run(experiment, workdir, options, given).train()


def is_finished(workdir: epath.Path, cfg: Config, options: Options) -> bool:
    """Whether this run has ended. Raises ConfigError when it is another config's run that has."""
    found = finished_step(workdir, hash_files=cfg.checkpoint.verify) if group.leads() else None
    step = group.share("the last step", found)
    if step is None:
        return False
    check_unchanged(workdir, cfg, allow=options.allow_config_change)
    return step >= cfg.train.steps


def has_report(workdir: epath.Path) -> bool:
    return group.share("whether there is a report", (workdir / "report.md").exists())


def say_finished(workdir: epath.Path) -> int:
    step = json.loads((workdir / "summary.json").read_text())["step"]
    print(f"{workdir} is finished after {step} steps; see {workdir / 'report.md'}")
    return DONE


def check_agreed(cfg: Config) -> None:
    """Raise ConfigError unless this process was started with the config of process 0."""
    theirs = configs.parse(json.loads(group.share("the config", configs.to_json(cfg))))
    if differing := configs.differences(theirs, cfg):
        key, (there, here) = next(iter(differing.items()))
        raise ConfigError(f"{key} is {here!r} here, but {there!r} at process 0; start all with the same command")


class Interrupted(Exception):  # noqa: N818
    """An evaluation was left off, because the run was asked to stop."""


# The run ----------------------------------------------------------------------------------------------------------


class Run:
    """One attempt at a run, from its newest checkpoint (or the start) to its end (or a preemption)."""

    def __init__(self, experiment: Experiment, workdir: epath.Path, options: Options, means: Means) -> None:
        self.experiment, self.task, self.cfg = experiment, experiment.task, experiment.cfg
        self.mesh = experiment.mesh
        self.workdir, self.options = workdir, options
        self.preemption, self.watchdog, self.step = means
        self.checkpoints = Checkpoints(workdir / "checkpoints", self.cfg.checkpoint)
        self.evaluations: dict[int, dict[str, Any]] = {}
        """By step, what evaluation found."""
        self.vote: Callable[[bool], bool] = bool if group.processes() == 1 else group.Vote()
        self.stopped = False
        """Whether all processes know that they shall stop."""

    def train(self) -> int:
        """Returns the exit code; the trackers learn how it ended even when it raises."""
        self.watchdog.beat("restoring")
        state = self.start_or_resume()
        self.frozen = assemble.frozen_params(self.experiment)
        self.attempt = next_attempt(self.workdir)
        self.records = Records(self.workdir, self.task)
        self.records.start(self.progress, self.attempt, self.options.command)
        status: Status = "failed"
        try:
            state, reached = self.loop(state)
            status = self.end(state, reached)
        except BaseException as error:
            status = "diverged" if isinstance(error, NumericalError) else "failed"
            self.seal_what_is_in_flight(error)
            raise
        finally:
            self.records.close(status)
        if group.leads():
            write_report(self.workdir, defaults=dataclasses.asdict(Config()))
        if status == "preempted":
            what = f"step {reached} is saved" if reached else "no step was taken yet"
            print(f"preempted: {what}; run the same command again to go on")
            return PREEMPTED
        print(f"report: {self.workdir / 'report.md'}   loss plot: {self.workdir / 'loss.png'}")
        return DONE

    def start_or_resume(self) -> TrainState:
        """The state to go on from; sets the progress and the source to match it."""
        state, meta, step = self.restore() or (assemble.initial_state(self.experiment), {}, 0)
        assert self.task.source is not None, "a run needs a task with data"
        source = self.task.source(
            rows=local_rows(self.mesh, self.cfg.train.batch),
            at=meta["data"] if meta else 0,
            allow_data_change=self.options.allow_data_change,
        )
        if group.share("the data", source.fingerprint) != source.fingerprint:
            raise DataError("the data here are not those of process 0; give all processes the same files")
        devices = 1 if self.mesh is None else self.mesh.size
        self.progress = Progress(self.task, source, step, meta, devices=devices)
        self.owed = meta.get("evaluation_owed", False) and step < self.cfg.train.steps
        return state

    def restore(self) -> tuple[TrainState, dict[str, Any], int] | None:
        """(state, meta, step) of the newest good checkpoint, or None. Scalar hyperparameters are the config's: it may
        have been changed explicitly."""
        abstract = assemble.abstract_state(self.experiment)
        restored = self.checkpoints.restore(abstract, unread=("hyper",))
        if restored is None:
            return None
        state, meta, step = restored
        steps = self.cfg.train.steps
        if step > steps:
            raise ConfigError(
                f"train.steps={steps} is below step {step} of the newest checkpoint in {self.workdir}; give "
                f"at least {step}, or move the checkpoints after step {steps} away to go back"
            )
        shardings = jax.tree.map(lambda x: x.sharding, abstract.hyper)
        scalars = jax.device_put(assemble.all_scalars(self.experiment), shardings)
        print(f"resuming {self.workdir} from step {step}")
        return state.replace(hyper=scalars), meta, step

    def loop(self, state: TrainState) -> tuple[TrainState, int]:
        if self.owed:  # a signal stopped the evaluation of the step that this attempt starts from
            self.evaluate(self.progress.start, state)
        reader = Reader(
            self.records.trackers.log,
            self.cfg.train.log_every,
            self.progress.accounting,
            max_skipped=self.cfg.train.max_skipped_in_a_row,
            skipped=int(state.counters.skipped_in_a_row),
        )
        return train(
            state,
            self.frozen,
            self.step,
            self.batches(),
            start=self.progress.start,
            steps=self.cfg.train.steps,
            reader=reader,
            periodic=self.periodic(),
            stop=self.stop,
            watchdog=self.watchdog,
        )

    def stop(self) -> bool:
        """Whether a signal, to any of the processes, asks to stop. Raises CheckpointError for a save that has failed.

        All processes call it at the same places, and so get the same answer.
        """
        self.checkpoints.poll()
        self.stopped = self.vote(self.preemption.requested) or self.stopped
        return self.stopped

    def batches(self) -> Iterator[Any]:
        return feed.batches(self.progress, self.mesh, self.cfg.train.batch, self.records.ledger, self.attempt)

    # What is done now and then

    def periodic(self) -> list[Periodic]:
        """Evaluate, save, then sample: a checkpoint holds the evaluation of its step, a failed sample loses nothing."""
        train_cfg = self.cfg.train
        return [
            *self.profile(),
            Periodic("evaluation", train_cfg.evaluate_every, self.evaluate, at_end=True),
            Periodic("checkpoint", self.cfg.checkpoint.every, self.save, at_end=True),
            Periodic("sample", train_cfg.sample.every, self.sample, at_end=True),
        ]

    def evaluate(self, step: int, state: TrainState) -> None:
        """Run the task's evaluations, with more of them at the end.

        Asked to stop, they end between two batches, and what they have by then counts for nothing: the next attempt
        owes this evaluation.
        """
        metrics: dict[str, Any] = {}
        last = step == self.cfg.train.steps
        try:
            for evaluate in self.task.evaluations.values():
                on_batch = functools.partial(self.between_batches, step)
                metrics |= evaluate(state.params, self.frozen, mesh=self.mesh, last=last, on_batch=on_batch)
        except Interrupted:
            return
        self.evaluations[step] = metrics
        self.records.trackers.log(step, {**self.progress.accounting.totals(step), **metrics})

    def between_batches(self, step: int, what: str) -> None:
        self.watchdog.beat(f"evaluation of {what} at step {step}")
        fault("evaluation.batch")
        if self.stop():
            raise Interrupted

    def sample(self, step: int, state: TrainState) -> None:
        if self.task.sample is None:
            return
        params, frozen = on_one_device(self.mesh, (state.params, self.frozen))
        if not group.leads():
            return
        try:
            text = self.task.sample(params, frozen)
        except Exception as error:  # a text to look at; what was trained is worth more
            logger.warning("no sample at step %d: %s: %s", step, type(error).__name__, one_line(error))
            return
        (self.workdir / "samples").mkdir(exist_ok=True)
        (self.workdir / "samples" / f"{step}.txt").write_text(text)

    def save(self, step: int, state: TrainState) -> None:
        self.records.sync()
        every = self.cfg.train.evaluate_every
        owed = every is not None and step % every == 0 and step not in self.evaluations
        meta = {**self.progress.meta(step), "config": configs.digest(self.cfg), "evaluation_owed": owed}
        scores = self.evaluations.get(step, {}).items()
        losses = [value for key, value in scores if key.startswith("val/") and key.endswith("/loss")]
        self.checkpoints.save(step, state, meta, value=float(np.mean(losses)) if losses else None)

    def profile(self) -> list[Periodic]:
        """A profiler trace of the steps that `--profile=FIRST:LAST` names."""
        if self.options.profile is None:
            return []
        before, last = self.options.profile[0] - 1, self.options.profile[1]

        def toggle(step: int, state: TrainState) -> None:
            jax.block_until_ready(state)
            if step == before:
                jax.profiler.start_trace(self.workdir / "profile")
            elif before > self.progress.start:
                jax.profiler.stop_trace()

        return [Periodic("profile", None, toggle, at=(before, last))]

    # The end

    def end(self, state: TrainState, reached: int) -> Status:
        """Make sure that what was reached is sealed; if that was the last step, write the summary."""
        self.watchdog.beat("the last checkpoint")
        if (self.checkpoints.last_step or 0) != reached:
            self.save(reached, state)
        self.checkpoints.wait()
        if reached < self.cfg.train.steps or self.stop():
            return "preempted"
        if reached not in self.evaluations:  # an earlier attempt ended between its last checkpoint and its summary
            self.evaluate(reached, state)
            if self.stopped:
                return "preempted"
            self.sample(reached, state)
        self.watchdog.beat("the baselines")
        if group.leads():
            self.records.finish(self.progress, reached, self.evaluations[reached])
        return "finished"

    def seal_what_is_in_flight(self, error: BaseException) -> None:
        """An error ends this attempt, but the save before it is good. Peers that are lost cannot help to seal it."""
        if isinstance(error, StallError):
            return
        self.watchdog.beat("the save in flight, after an error")
        try:
            self.checkpoints.wait()
        except Exception as second:
            logger.warning("%s", second)
