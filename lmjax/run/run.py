"""The train command: start or resume, train, evaluate, sample, save, report."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath

from lmjax import config as configs
from lmjax.config import Config
from lmjax.data.batch import Batch
from lmjax.data.loader import Loader
from lmjax.devices.chips import peak_flops
from lmjax.devices.place import local_rows, on_one_device, replicate, shard_batch
from lmjax.errors import DONE, PREEMPTED, ConfigError, DataError, NumericalError, StallError
from lmjax.evaluate import baselines, splits
from lmjax.evaluate.likelihood import Evaluation
from lmjax.models.flops import sequence_flops
from lmjax.optim.config import hyper
from lmjax.process import faults, group, start_up
from lmjax.process.signals import Preemption, Watchdog
from lmjax.record import seal
from lmjax.record.checkpoint import Checkpoints
from lmjax.record.console import ConsoleTracker
from lmjax.record.ledger import Ledger, joined_crc, row_crcs
from lmjax.record.redact import redact
from lmjax.record.report import write_report
from lmjax.record.tracking import JsonlTracker, Status, Tracker, Trackers
from lmjax.record.wandb_tracker import WandbTracker
from lmjax.run import assemble
from lmjax.run.assemble import Experiment
from lmjax.run.workdir import check_unchanged, finished_step, locate, lock, make_workdir, next_attempt, wandb_id
from lmjax.tasks import pretrain
from lmjax.tasks.pretrain import Data
from lmjax.train.loop import Accounting, Counts, Periodic, Reader, train
from lmjax.train.state import TrainState
from lmjax.weights import count

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Options(NamedTuple):
    """What the command line says beside the config."""

    profile: tuple[int, int] | None = None
    """First and last step of a profiler trace."""
    allow_config_change: bool = False
    allow_data_change: bool = False
    command: str = ""


def run(cfg: Config, workdir: epath.PathLike, options: Options) -> int:
    """Train, or go on training, in `workdir`; returns the exit code. A finished run is left as it is.

    DONE means that the last checkpoint verifies and that summary and report are there, on every call.
    """
    workdir = locate(workdir)
    check_agreed(cfg)
    if is_finished(workdir, cfg, options) and has_report(workdir):
        return say_finished(workdir)
    with lock(workdir):
        if is_finished(workdir, cfg, options):  # by the run that was waited for, or by one that died over its report
            if not has_report(workdir) and group.leads():
                write_report(workdir, defaults=dataclasses.asdict(Config()))
            return say_finished(workdir)
        make_workdir(workdir)
        check_unchanged(workdir, cfg, allow=options.allow_config_change)
        data = pretrain.open_data(cfg)
        pretrain.check_sample(cfg.train.sample, data.tokenizer)
        experiment = assemble.assemble(assemble.with_vocab(cfg, data.tokenizer))
        with Preemption() as preemption, Watchdog(cfg.train.step_timeout) as watchdog:
            return Run(experiment, data, workdir, options, preemption, watchdog).train()


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


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """The same items, each asked for while the one before is being used."""
    item = next(items)
    for following in items:
        yield item
        item = following
    yield item


class Interrupted(Exception):  # noqa: N818
    """Something that can be done again was left off, to stop sooner."""


# The run ----------------------------------------------------------------------------------------------------------


class Run:
    """One attempt at a run, from its newest checkpoint (or the start) to its end (or a preemption)."""

    def __init__(
        self,
        experiment: Experiment,
        data: Data,
        workdir: epath.Path,
        options: Options,
        preemption: Preemption,
        watchdog: Watchdog,
    ) -> None:
        self.experiment, self.cfg, self.data = experiment, experiment.cfg, data
        self.workdir, self.options = workdir, options
        self.preemption, self.watchdog = preemption, watchdog
        self.checkpoints = Checkpoints(workdir / "checkpoints", self.cfg.checkpoint)
        self.scorer = splits.float32(self.cfg.model)
        self.validation = {
            name: dataset.split("valid")
            for name, dataset in data.datasets.items()
            if "valid" in dataset.manifest.splits
        }
        self.evaluate_batch = self.cfg.train.evaluate_batch or self.cfg.train.batch
        self.evaluations: dict[int, dict[str, Any]] = {}
        """By step, what evaluation found."""
        self.vote: Callable[[bool], bool] = bool if group.processes() == 1 else group.Vote()
        self.stopped = False
        """Whether all processes know that they shall stop."""
        self.ledger: Ledger | None = None
        self.records: list[Ledger | JsonlTracker] = []
        """What must be on the storage when a checkpoint is sealed; none but at process 0."""

    def train(self) -> int:
        """Returns the exit code; the trackers learn how it ended even when it raises."""
        self.watchdog.beat("restoring")
        state = self.start_or_resume()
        self.attempt = next_attempt(self.workdir)
        if group.leads():
            self.run_id = wandb_id(self.workdir, self.cfg)
            seal.write_atomically(self.workdir / "config.json", configs.to_json(self.cfg))
            self.data.tokenizer.save(self.workdir / "tokenizer")
            self.ledger = Ledger(self.workdir / "ledger.jsonl")
            self.records.append(self.ledger)
        self.trackers = self.make_trackers()
        self.trackers.start(self.information())
        status: Status = "failed"
        try:
            state, reached = self.loop(state)
            status = self.end(state, reached)
        except BaseException as error:
            status = "diverged" if isinstance(error, NumericalError) else "failed"
            self.seal_what_is_in_flight(error)
            raise
        finally:
            if self.ledger is not None:
                self.ledger.close()
            self.trackers.close(status)
        if group.leads():
            write_report(self.workdir, defaults=dataclasses.asdict(Config()))
        if status == "preempted":
            what = f"step {reached} is saved" if reached else "no step was taken yet"
            print(f"preempted: {what}; run the same command again to go on")
            return PREEMPTED
        print(f"report: {self.workdir / 'report.md'}   loss plot: {self.workdir / 'loss.png'}")
        return DONE

    def start_or_resume(self) -> TrainState:
        """The state to go on from; sets the accounting and the loader to match it."""
        restored = self.checkpoints.restore(assemble.abstract_state(self.experiment))
        meta: dict[str, Any] = {}
        if restored is None:
            state, step = assemble.initial_state(self.experiment), 0
        else:
            state, meta, step = restored
            train = self.cfg.train
            if step > train.steps:
                raise ConfigError(
                    f"train.steps={train.steps} is below step {step} of the newest checkpoint in {self.workdir}; give "
                    f"at least {step}, or move the checkpoints after step {train.steps} away to go back"
                )
            # A changed config was allowed explicitly: what is scalar in it counts from here on.
            scalars = hyper(self.cfg.optimizer, steps=train.steps, seed=train.seed)
            state = state.replace(hyper=jax.device_put(scalars, jax.tree.map(lambda x: x.sharding, state.hyper)))
            print(f"resuming {self.workdir} from step {step}")
        self.loader = Loader(
            self.cfg.data,
            batch_size=self.cfg.train.batch,
            rows=local_rows(self.experiment.mesh, self.cfg.train.batch),
            start=meta["data"] if meta else 0,
            allow_data_change=self.options.allow_data_change,
        )
        if group.share("the data", self.loader.fingerprint) != self.loader.fingerprint:
            raise DataError("the data here are not those of process 0; give all processes the same files")
        self.accounting = self.make_accounting(step, meta)
        self.epochs_before = self.make_epochs_before(meta)
        self.owed = meta.get("evaluation_owed", False) and step < self.cfg.train.steps
        return state

    def make_accounting(self, step: int, meta: dict[str, Any]) -> Accounting:
        """Counts on from what the checkpoint says was done."""
        device = jax.devices()[0]
        peak = peak_flops(device.device_kind)
        mesh = self.experiment.mesh
        flops = sequence_flops(self.experiment.model, self.cfg.data.seq_len)
        per_sequence = Counts(1, self.cfg.data.seq_len, flops.six_nd, flops.causal, flops.full)
        if "counts" in meta:
            before = Counts(**meta["counts"])
        else:  # a new run, or an older checkpoint, whose sequences count as those to come
            before = Counts(0, 0, 0, 0, 0).plus(self.loader.next_sample, per_sequence)
            if meta:
                before = before._replace(tokens=meta["tokens"], flops_causal=meta["flops"])
        return Accounting(
            start=step,
            before=before,
            batch=self.cfg.train.batch,
            per_sequence=per_sequence,
            peak_flops=None if peak is None else peak * (1 if mesh is None else mesh.size),
        )

    def make_epochs_before(self, meta: dict[str, Any]) -> dict[str, float]:
        """By source, what the loader does not count: epochs from before the data were changed."""
        if "epochs" not in meta or meta["data"]["fingerprint"] == self.loader.fingerprint:
            return meta.get("epochs_before", {})
        counted = self.loader.epoch(self.loader.next_sample)
        return {name: epochs - counted.get(name, 0.0) for name, epochs in meta["epochs"].items()}

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source was seen, those too that the run no longer reads."""
        counted = self.loader.epoch(samples)
        names = {**self.epochs_before, **counted}
        return {name: self.epochs_before.get(name, 0.0) + counted.get(name, 0.0) for name in names}

    def loop(self, state: TrainState) -> tuple[TrainState, int]:
        train_cfg = self.cfg.train
        if self.owed:  # a signal stopped the evaluation of the step that this attempt starts from
            self.evaluate(self.accounting.start, state)
        reader = Reader(
            self.trackers.log,
            train_cfg.log_every,
            self.accounting,
            max_skipped=train_cfg.max_skipped_in_a_row,
            skipped=int(state.counters.skipped_in_a_row),
        )
        return train(
            state,
            {},
            assemble.compiled_step(self.experiment),
            self.batches(),
            start=self.accounting.start,
            steps=train_cfg.steps,
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

    def batches(self) -> Iterator[Batch]:
        """Batches on the devices, each written to the ledger before it is used."""
        size = self.cfg.train.batch
        placed = self.placed_batches()
        for step, (batch, crcs_B) in enumerate(placed, self.accounting.start + 1):
            if self.ledger is not None:
                crc = joined_crc(np.asarray(crcs_B), 4 * self.cfg.data.seq_len)
                first = self.accounting.counts(step - 1).samples
                self.ledger.record(self.attempt, step, first, size, crc, self.loader.fingerprint[:8])
            yield batch

    def placed_batches(self) -> Iterator[tuple[Batch, Any]]:
        """Batches on the devices, with the CRC of each of their rows from the process that feeds it.

        Several processes need a collective to learn the others' CRCs. It is sent off one batch ahead: then it is done
        by the time that it is read, and the devices never wait for the ledger.
        """
        mesh = self.experiment.mesh
        place = shard_batch(mesh, self.cfg.train.batch)

        def with_crcs(batch: Batch) -> tuple[Batch, Any]:
            crcs_B = row_crcs(batch.tokens_BT)
            return place(batch), crcs_B if group.processes() == 1 else replicate(mesh, place(crcs_B))

        placed = map(with_crcs, self.loader)
        return placed if group.processes() == 1 else prefetch(placed)

    # What is done now and then

    def periodic(self) -> list[Periodic]:
        """The checkpoint holds the evaluation of its step, and a sample that fails costs nothing that it holds."""
        train_cfg = self.cfg.train
        return [
            *self.profile(),
            Periodic("evaluation", train_cfg.evaluate_every, self.evaluate, at_end=True),
            Periodic("checkpoint", self.cfg.checkpoint.every, self.save, at_end=True),
            Periodic("sample", train_cfg.sample.every, self.sample, at_end=True),
        ]

    def evaluate(self, step: int, state: TrainState) -> None:
        """Score the same batches every time, as `val/`; at the end also the whole sets, as `val_full/`.

        Asked to stop, it ends between two batches, and what it has by then counts for nothing: the next attempt owes
        this evaluation.
        """
        limit = self.cfg.train.evaluate_batches
        try:
            results = self.score(step, state, limit)
            metrics: dict[str, Any] = splits.evaluation_metrics(results)
            metrics |= {f"data/{name}/valid_digest": result.digest for name, result in results.items()}
            if step == self.cfg.train.steps:
                whole = results if limit is None else self.score(step, state, None)
                metrics |= splits.evaluation_metrics(whole, "val_full")
        except Interrupted:
            return
        self.evaluations[step] = metrics
        self.trackers.log(step, {**self.accounting.totals(step), **metrics})

    def score(self, step: int, state: TrainState, limit: int | None) -> dict[str, Evaluation]:
        """Every validation set, or its first `limit` batches, under the parameters of `step`."""
        return {
            name: splits.evaluate_split(
                self.scorer,
                state.params,
                split,
                self.cfg.data,
                batch=self.evaluate_batch,
                limit=limit,
                mesh=self.experiment.mesh,
                on_batch=functools.partial(self.between_batches, f"evaluation of {name} at step {step}"),
            )
            for name, split in self.validation.items()
        }

    def between_batches(self, doing: str) -> None:
        self.watchdog.beat(doing)
        faults.fault("evaluation.batch")
        if self.stop():
            raise Interrupted

    def sample(self, step: int, state: TrainState) -> None:
        if not self.cfg.train.sample.prompts:
            return
        params = on_one_device(self.experiment.mesh, state.params)
        if not group.leads():
            return
        try:
            text = pretrain.sample_text(self.experiment.model, params, self.data.tokenizer, self.cfg.train.sample)
        except Exception as error:  # a text to look at; what was trained is worth more
            logger.warning("no sample at step %d: %s: %s", step, type(error).__name__, " ".join(str(error).split()))
            return
        (self.workdir / "samples").mkdir(exist_ok=True)
        (self.workdir / "samples" / f"{step}.txt").write_text(text)

    def save(self, step: int, state: TrainState) -> None:
        for record in self.records:
            record.sync()
        counts = self.accounting.counts(step)
        every = self.cfg.train.evaluate_every
        meta = {
            "data": self.loader.state(counts.samples),
            "config": configs.digest(self.cfg),
            **self.accounting.totals(step),
            "counts": counts._asdict(),
            "epochs": self.epochs(counts.samples),
            "epochs_before": self.epochs_before,
            "evaluation_owed": every is not None and step % every == 0 and step not in self.evaluations,
        }
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
            elif before > self.accounting.start:
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
        if group.leads():
            self.finish(reached)
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

    def finish(self, reached: int) -> None:
        """Write the summary: then the run is finished."""
        summary = self.summary(reached)
        if self.cfg.train.compression_baseline:
            self.watchdog.beat("compressing the validation text")
            summary |= baselines.compression_baselines(self.data.datasets, self.data.tokenizer)
        self.trackers.summary(summary)
        for record in self.records:
            record.sync()
        seal.write_atomically(self.workdir / "summary.json", json.dumps(summary, indent=1))
        self.print_summary(summary)

    def summary(self, step: int) -> dict[str, Any]:
        counts = count(self.experiment.model.spec)
        totals = self.accounting.counts(step)
        return {
            "status": "finished",
            "step": step,
            "seed": self.cfg.train.seed,
            "params/total": counts.total,
            "params/non_embedding": counts.non_embedding,
            "params/matmul": counts.matmul,
            "params/active": counts.active,
            "tokens": totals.tokens,
            "flops_6nd": totals.flops_6nd,
            "flops_causal": totals.flops_causal,
            "flops_full": totals.flops_full,
            **{f"epochs/{name}": epochs for name, epochs in self.epochs(totals.samples).items()},
            "data/fingerprint": self.loader.fingerprint,
            **self.evaluations.get(step, {}),
        }

    def print_summary(self, summary: dict[str, Any]) -> None:
        for key, value in summary.items():
            if key.startswith(("val/", "val_full/")):
                print(f"{key} {value:.4f}")
        sample = self.workdir / "samples" / f"{summary['step']}.txt"
        if sample.exists():
            print(sample.read_text())

    # Tracking

    def make_trackers(self) -> Trackers:
        """None but at process 0."""
        if not group.leads():
            return Trackers([])
        metrics = JsonlTracker(self.workdir / "metrics.jsonl")
        self.records.append(metrics)
        trackers: list[Tracker] = [metrics, ConsoleTracker()]
        if self.cfg.tracking.wandb != "off":
            name = self.cfg.tracking.name or self.workdir.name
            trackers.append(WandbTracker(self.cfg.tracking, self.run_id, name, self.workdir))
        return Trackers(trackers)

    def information(self) -> dict[str, Any]:
        """What an attempt says of itself when it starts."""
        counts = count(self.experiment.model.spec)
        return {
            "step": self.accounting.start,
            "steps": self.cfg.train.steps,
            "attempt": self.attempt,
            "command": self.options.command,
            "workdir": str(self.workdir),
            "config": redact(dataclasses.asdict(self.cfg)),
            "params": dataclasses.asdict(counts),
            "data": {name: dataset.manifest.fingerprint for name, dataset in self.data.datasets.items()},
            "validation": {name: split.digest for name, split in self.validation.items()},
            "environment": start_up.environment(),
        }
