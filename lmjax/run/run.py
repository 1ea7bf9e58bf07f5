"""The train command: start or resume, train, evaluate, sample, save, report."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lmjax import config as configs
from lmjax.config import Config
from lmjax.devices import replicas
from lmjax.devices.place import gather_to_one_device, local_rows
from lmjax.errors import DONE, PREEMPTED, ConfigError, DataError, NumericalError, StallError, one_line
from lmjax.process import group
from lmjax.process.faults import fault
from lmjax.process.redact import hide
from lmjax.process.signals import Preemption, Watchdog
from lmjax.record import files
from lmjax.record.checkpoint import Checkpoints
from lmjax.record.lease import Lease
from lmjax.record.report import write_report
from lmjax.record.tracking import Status
from lmjax.registry import TASKS, with_data
from lmjax.run import assemble, branch, feed, origin, replay, rollback
from lmjax.run.assemble import Experiment
from lmjax.run.progress import Progress, check_meta
from lmjax.run.records import Records
from lmjax.run.workdir import (
    check_agreed,
    check_not_lost,
    check_unchanged,
    finished_step,
    has_report,
    held,
    identity,
    locate,
    lock,
    make_workdir,
    next_attempt,
    note_sealed,
    run_id,
    saved_config,
    summary_step,
)
from lmjax.tasks.task import Task
from lmjax.train.loop import Hook, MetricsLogger, train
from lmjax.train.state import TrainState
from lmjax.train.step import Step
from lmjax.weights import Params

logger = logging.getLogger(__name__)


class Options(NamedTuple):
    """What the command line says beside the config."""

    profile: tuple[int, int] | None = None
    """First and last step of a profiler trace."""
    allow_config_change: bool = False
    allow_data_change: bool = False
    command: str = ""


class Runtime(NamedTuple):
    """Signal handler, watchdog and train step. A run alone in its process has its own; runs of a stack share them."""

    preemption: Preemption
    watchdog: Watchdog
    train_step: Step


@contextlib.contextmanager
def own_runtime(experiment: Experiment) -> Iterator[Runtime]:
    """The runtime of a run that is alone in its process."""
    with Preemption() as preemption, Watchdog(experiment.cfg.train.step_timeout) as watchdog:
        yield Runtime(preemption, watchdog, assemble.compiled_step(experiment))


def run(
    cfg: Config,
    workdir: epath.PathLike,
    options: Options,
    make_task: Callable[[Config], Task] | None = None,
    make_runtime: Callable[[Experiment], contextlib.AbstractContextManager[Runtime]] = own_runtime,
) -> int:
    """Train, or go on training, in `workdir`; returns the exit code. A finished run is left as it is.

    `make_task` makes of the config what is trained (default: the one that the config names). DONE means that the last
    checkpoint verifies and that summary and report are there, on every call.
    """
    workdir = locate(workdir)
    check_agreed(cfg)
    cfg = origin.with_pinned_origins(cfg, saved_config(workdir), workdir)
    if is_finished(workdir, cfg, options) and has_report(workdir) and has_files(workdir, cfg):
        return say_finished(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(workdir))
        if is_finished(workdir, cfg, options):  # by the run that was waited for, or by one that died over its report
            if not has_files(workdir, cfg):
                task = (make_task or with_data)(cfg)
                if group.is_leader():
                    task.write_files(workdir)
            if not has_report(workdir) and group.is_leader():
                write_report(workdir, defaults=dataclasses.asdict(Config()))
            return say_finished(workdir)
        make_workdir(workdir)
        lease = stack.enter_context(held(workdir))
        check_unchanged(workdir, cfg, allow=options.allow_config_change)
        check_not_lost(workdir)
        branch.begin(workdir, cfg)
        task = (make_task or with_data)(cfg)
        experiment = assemble.assemble(task)
        with make_runtime(experiment) as runtime:
            return Run(experiment, workdir, options, runtime, lease).train()


def is_finished(workdir: epath.Path, cfg: Config, options: Options) -> bool:
    """Whether this run has ended. Raises ConfigError when it is another config's run that has."""
    found = finished_step(workdir, hash_files=cfg.checkpoint.verify) if group.is_leader() else None
    step = group.broadcast("the last step", found)
    if step is None:
        return False
    check_unchanged(workdir, cfg, allow=options.allow_config_change)
    return step >= cfg.train.steps


def has_files(workdir: epath.Path, cfg: Config) -> bool:
    return group.broadcast("whether the task's files are there", TASKS[cfg.task].has_files(workdir))


def say_finished(workdir: epath.Path) -> int:
    step = summary_step(workdir / "summary.json")
    print(f"{workdir} is finished after {step} steps; see {workdir / 'report.md'}")
    return DONE


class Interrupted(Exception):  # noqa: N818
    """An evaluation was left off, because the run was asked to stop."""


# The run ----------------------------------------------------------------------------------------------------------


class Run:
    """One attempt at a run, from its newest checkpoint (or the start) to its end (or a preemption)."""

    # `train` sets these before its loop begins.
    progress: Progress
    frozen: Params
    """The weights that the loss reads and nothing changes."""
    run_id: str
    attempt: int
    records: Records

    def __init__(
        self, experiment: Experiment, workdir: epath.Path, options: Options, runtime: Runtime, lease: Lease
    ) -> None:
        self.experiment, self.task, self.cfg = experiment, experiment.task, experiment.cfg
        self.mesh = experiment.mesh
        self.workdir, self.options, self.lease = workdir, options, lease
        self.preemption, self.watchdog, self.train_step = runtime
        self.checkpoints = Checkpoints(workdir / "checkpoints", self.cfg.checkpoint, may_write=lease.check)
        self.evaluations: dict[int, dict[str, Any]] = {}
        """What the evaluation at each step found."""
        self.vote: Callable[[bool], bool] = bool if group.processes() == 1 else group.Vote()
        self.stopped = False
        """Whether all processes know that they shall stop."""
        self.noted = False
        """Whether the work directory says that a step was sealed."""

    def train(self) -> int:
        """Train, and return the exit code. The trackers learn how the attempt ended even when it raises."""
        self.watchdog.beat("restoring")
        self.run_id = group.broadcast("the run", run_id(self.workdir, self.cfg) if group.is_leader() else None)
        state, self.progress, evaluation_owed = self.start_or_resume()
        self.frozen = assemble.frozen_params(self.experiment)
        self.attempt = next_attempt(self.workdir)
        self.records = Records(self.workdir, self.experiment, self.run_id)
        self.records.log_start(self.progress, self.attempt, self.options.command)
        status: Status = "failed"
        try:
            if evaluation_owed:
                self.evaluate(self.progress.start_step, state)
            state, reached = self.loop(state)
            status = self.end(state, reached)
        except BaseException as error:
            status = "diverged" if isinstance(error, NumericalError) else "failed"
            self.seal_what_is_in_flight(error)
            raise
        finally:
            self.records.close(status)
        if group.is_leader():
            write_report(self.workdir, defaults=dataclasses.asdict(Config()))
        if status == "preempted":
            what = f"step {reached} is saved" if reached else "no step was taken yet"
            print(f"preempted: {what}; run the same command again to go on")
            return PREEMPTED
        print(f"report: {self.workdir / 'report.md'}   loss plot: {self.workdir / 'loss.png'}")
        return DONE

    def start_or_resume(self) -> tuple[TrainState, Progress, bool]:
        """The state that this attempt starts from, the run's progress up to there, and whether the evaluation of that
        step is owed: a signal stopped it."""
        state, meta, step = self.restore() or (assemble.initial_state(self.experiment), {}, 0)
        meta = rollback.resumed(self.workdir, meta, step)
        assert self.task.source is not None, "a run needs a task with data"
        source = self.task.source(
            rows=local_rows(self.mesh, self.cfg.train.batch),
            at=meta["data"] if meta else 0,
            allow_data_change=self.options.allow_data_change,
        )
        if group.broadcast("the data", source.fingerprint) != source.fingerprint:
            raise DataError("the data here are not those of process 0; give all processes the same files")
        devices = 1 if self.mesh is None else self.mesh.size
        progress = Progress(self.task, source, step, meta, devices=devices)
        return state, progress, meta.get("evaluation_owed", False) and step < self.cfg.train.steps

    def restore(self) -> tuple[TrainState, dict[str, Any], int] | None:
        """Restore (state, meta, step) from the newest good checkpoint; return None if there is none.

        Scalar hyperparameters are the config's, not the checkpoint's: the user may have changed them."""
        abstract = assemble.abstract_state(self.experiment)
        restored = self.checkpoints.restore(abstract, unread=("hyper",))
        if restored is None:
            return None
        state, meta, step = restored
        check_meta(meta, step, self.task.frozen)
        steps = self.cfg.train.steps
        if step > steps:
            raise ConfigError(
                f"train.steps={steps} is below step {step} of the newest checkpoint in {self.workdir}; give "
                f"at least {step}, or move the checkpoints after step {steps} away to go back"
            )
        print(f"resuming {self.workdir} from step {step}")
        return state.replace(hyper=assemble.placed_scalars(self.experiment)), meta, step

    def loop(self, state: TrainState) -> tuple[TrainState, int]:
        """Train on from `state`. Returns the state and the step that were reached."""
        metrics_logger = MetricsLogger(
            self.records.trackers.log,
            self.cfg.train.log_every,
            self.progress.accounting,
            max_skipped=self.cfg.train.max_skipped_in_a_row,
            skipped=int(state.counters.skipped_in_a_row),
            keep=functools.partial(replay.keep, self.workdir, self.mesh),
        )
        return train(
            state,
            self.frozen,
            self.train_step,
            self.batches(),
            start_step=self.progress.start_step,
            steps=self.cfg.train.steps,
            metrics_logger=metrics_logger,
            hooks=self.hooks(),
            stop=self.stop,
            watchdog=self.watchdog,
        )

    def stop(self) -> bool:
        """Whether a signal, to any of the processes, asks to stop. Raises CheckpointError for a save that has failed,
        StallError for a process that was given up.

        All processes call it at the same places, and so get the same answer.
        """
        self.lease.check()
        self.checkpoints.poll()
        self.note_sealed()
        self.stopped = self.vote(self.preemption.requested) or self.stopped
        return self.stopped

    def note_sealed(self) -> None:
        if not self.noted and self.checkpoints.sealed_step is not None and group.is_leader():
            note_sealed(self.workdir)
            self.noted = True

    def batches(self) -> Iterator[Any]:
        return feed.batches(self.progress, self.mesh, self.cfg.train.batch, self.records.ledger, self.attempt)

    # What is done now and then

    def hooks(self) -> list[Hook]:
        """Evaluate, save, then sample: a checkpoint holds the evaluation of its step, a failed sample loses nothing."""
        train_cfg = self.cfg.train
        return [
            *self.profile(),
            Hook("comparison of copies", train_cfg.check_replicas, replicas.check),
            Hook("evaluation", train_cfg.evaluate_every, self.evaluate, at_end=True),
            Hook("checkpoint", self.cfg.checkpoint.every, self.save, at_end=True),
            Hook("sample", train_cfg.sample.every, self.sample, at_end=True),
        ]

    def evaluate(self, step: int, state: TrainState) -> None:
        """Run the task's evaluations, with more of them at the end.

        Asked to stop, they end between two batches, and what they have by then counts for nothing: the next attempt
        owes this evaluation.
        """
        try:
            metrics = self.scores(step, state.delivered)
            if state.average is not None:
                raw = self.scores(step, state.params).items()
                metrics |= {f"raw/{name}": value for name, value in raw if name.startswith(("val", "eval"))}
        except Interrupted:
            return
        self.evaluations[step] = metrics
        self.records.trackers.log(step, {**self.progress.accounting.totals(step), **metrics})

    def scores(self, step: int, params: Params) -> dict[str, Any]:
        """What the task's evaluations find. Raises Interrupted."""
        metrics: dict[str, Any] = {}
        on_batch, last = functools.partial(self.between_batches, step), step == self.cfg.train.steps
        for evaluate in self.task.evaluations.values():
            metrics |= evaluate(params, self.frozen, step=step, mesh=self.mesh, last=last, on_batch=on_batch)
        return metrics

    def between_batches(self, step: int, what: str) -> None:
        self.watchdog.beat(f"evaluation of {what} at step {step}")
        fault("evaluation.batch")
        if self.stop():
            raise Interrupted

    def sample(self, step: int, state: TrainState) -> None:
        if self.task.sample is None:
            return
        params, frozen = gather_to_one_device(self.mesh, (state.delivered, self.frozen))
        if not group.is_leader():
            return
        try:
            text = self.task.sample(params, frozen)
        except Exception as error:  # a text to look at; what was trained is worth more
            logger.warning("no sample at step %d: %s: %s", step, type(error).__name__, one_line(error))
            return
        (self.workdir / "samples").mkdir(exist_ok=True)
        files.write_atomically(self.workdir / "samples" / f"{step}.txt", hide(text))

    def save(self, step: int, state: TrainState) -> None:
        if self.cfg.train.check_replicas is not None:
            replicas.check(step, state)
        self.records.sync()
        every = self.cfg.train.evaluate_every
        owed = every is not None and step % every == 0 and step not in self.evaluations
        named = {"run": self.run_id, "identity": identity(self.cfg), "config": configs.digest(self.cfg)}
        meta = {**self.progress.meta(step), **named, "evaluation_owed": owed}
        scores = self.evaluations.get(step, {}).items()
        losses = [value for key, value in scores if key.startswith("val/") and key.endswith("/loss")]
        self.checkpoints.save(step, state, meta, value=float(np.mean(losses)) if losses else None)

    def profile(self) -> list[Hook]:
        """A profiler trace of the steps that `--profile=FIRST:LAST` names."""
        if self.options.profile is None:
            return []
        before, last = self.options.profile[0] - 1, self.options.profile[1]

        def toggle(step: int, state: TrainState) -> None:
            jax.block_until_ready(state)
            if step == before:
                jax.profiler.start_trace(self.workdir / "profile")
            elif before > self.progress.start_step:
                jax.profiler.stop_trace()

        return [Hook("profile", None, toggle, at=(before, last))]

    # The end

    def end(self, state: TrainState, reached: int) -> Status:
        """Make sure that what was reached is sealed; if that was the last step, write the summary."""
        self.watchdog.beat("the last checkpoint")
        if (self.checkpoints.last_step or 0) != reached:
            self.save(reached, state)
        self.checkpoints.wait()
        self.note_sealed()
        if reached < self.cfg.train.steps or self.stop():
            return "preempted"
        if reached not in self.evaluations:  # an earlier attempt ended between its last checkpoint and its summary
            self.evaluate(reached, state)
            if self.stopped:
                return "preempted"
            self.sample(reached, state)
        self.watchdog.beat("the baselines")
        self.lease.check()
        if group.is_leader():
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
