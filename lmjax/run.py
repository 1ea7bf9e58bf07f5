"""The train command: start or resume, train, evaluate, sample, save, report."""

import contextlib
import dataclasses
import fnmatch
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath

from lmjax import config as configs
from lmjax import distributed, runtime, seal
from lmjax import experiment as parts
from lmjax.checkpoint import Checkpoints
from lmjax.chips import peak_flops
from lmjax.config import Config
from lmjax.data.batch import Batch
from lmjax.data.loader import Loader
from lmjax.data.storage import is_remote
from lmjax.errors import DONE, PREEMPTED, CheckpointError, ConfigError, DataError, NumericalError, StallError
from lmjax.evaluate.likelihood import Evaluation
from lmjax.experiment import Data, Experiment
from lmjax.ledger import Ledger, joined_crc, row_crcs
from lmjax.models.flops import sequence_flops
from lmjax.optim.config import hyper
from lmjax.runtime import Preemption, Watchdog
from lmjax.tracking import ConsoleTracker, JsonlTracker, Status, Tracker, Trackers, WandbTracker, read_events, redact
from lmjax.train.loop import Accounting, Periodic, Reader, train
from lmjax.train.report import write_report
from lmjax.train.state import TrainState
from lmjax.weights import count

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A resumed run must mean the same run. How often it looks, saves and reports, and on what machine, may change.
_FIXED = ("model.", "data.", "optimizer.", "train.steps", "train.batch", "train.seed", "train.loss.")
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


class Options(NamedTuple):
    """What the command line says beside the config."""

    profile: tuple[int, int] | None = None
    """First and last step of a profiler trace."""
    allow_config_change: bool = False
    allow_data_change: bool = False
    command: str = ""


def run(cfg: Config, workdir: epath.PathLike, options: Options) -> int:
    """Train, or go on training, in `workdir`; returns the exit code. A finished run is left as it is."""
    workdir = epath.Path(workdir)
    check_agreed(cfg)
    if is_finished(workdir, cfg, options):
        return DONE
    with to_itself(workdir):
        if is_finished(workdir, cfg, options):  # by the run that was waited for
            return DONE
        make_workdir(workdir)
        check_unchanged(workdir, cfg, allow=options.allow_config_change)
        data = parts.open_data(cfg)
        parts.check_sample(cfg.train.sample, data.tokenizer)
        experiment = parts.assemble(parts.with_vocab(cfg, data.tokenizer))
        with Preemption() as preemption, Watchdog(cfg.train.step_timeout) as watchdog:
            return Run(experiment, data, workdir, options, preemption, watchdog).train()


def check_agreed(cfg: Config) -> None:
    """Raise ConfigError unless this process was started with the config of process 0."""
    theirs = configs.parse(json.loads(distributed.share("the config", configs.to_json(cfg))))
    if differing := configs.differences(theirs, cfg):
        key, (there, here) = next(iter(differing.items()))
        raise ConfigError(f"{key} is {here!r} here, but {there!r} at process 0; start all with the same command")


# The work directory -----------------------------------------------------------------------------------------------


def is_finished(workdir: epath.Path, cfg: Config, options: Options) -> bool:
    """Whether this run has ended, and says so. Raises ConfigError when it is another config's run that has."""
    path = workdir / "summary.json"
    step = distributed.share("the last step", json.loads(path.read_text())["step"] if path.exists() else None)
    if step is None:
        return False
    check_unchanged(workdir, cfg, allow=options.allow_config_change)
    if step < cfg.train.steps:
        return False
    print(f"{workdir} is finished after {step} steps; see {workdir / 'report.md'}")
    return True


def check_unchanged(workdir: epath.Path, cfg: Config, *, allow: bool) -> None:
    """Raise ConfigError when `workdir` holds a run of another config."""
    path = workdir / "config.json"
    if allow or not path.exists():
        return
    changed = configs.differences(configs.from_json(path), cfg)
    if cfg.model.vocab is None:  # the saved config has it filled in from the data, which has its own check
        changed.pop("model.vocab", None)
    fixed = {key: values for key, values in changed.items() if key.startswith(_FIXED) and not _is_free(key)}
    if fixed:
        shown = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in list(fixed.items())[:5])
        raise ConfigError(
            f"{workdir} holds a run of another config: {shown}; use another --workdir, or --allow-config-change"
        )


def _is_free(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in _FREE)


@contextlib.contextmanager
def to_itself(workdir: epath.Path, patience: float = 120.0) -> Iterator[None]:
    """Keeps a second run out of `workdir`; the lock of a run that dies goes with it.

    Buckets, and file systems without locks, keep nobody out. Raises StallError when another run is still there after
    `patience` seconds, and CheckpointError when nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        free = True
        if distributed.leads():
            with _writing(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                if not is_remote(workdir):
                    file = stack.enter_context((workdir / ".lock").open("wb"))
                    free = _locked(file, workdir, patience)
        if not distributed.share("whether the work directory is free", free):
            raise StallError(f"another process trains in {workdir}; wait for it, stop it, or use another --workdir")
        yield


def _locked(file: Any, workdir: epath.Path, patience: float) -> bool:
    import fcntl

    deadline = None
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by a forked child
        except (BlockingIOError, PermissionError):
            if deadline is None:
                print(f"another process trains in {workdir}; waiting up to {patience:.0f} s for it to end", flush=True)
                deadline = time.monotonic() + patience
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return True
        else:
            return True


def make_workdir(workdir: epath.Path) -> None:
    """Raises CheckpointError when nothing can be written there, or not all processes see what one wrote: now, not at
    the first checkpoint."""
    probe = workdir / ".writable"
    with _writing(workdir):
        if distributed.leads():
            workdir.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
        distributed.barrier("the work directory")
        if not probe.exists():
            raise CheckpointError(
                f"--workdir={workdir} is not the one of process 0; choose one that all processes share"
            )
        distributed.barrier("the work directory")
        if distributed.leads():
            probe.unlink()


@contextlib.contextmanager
def _writing(workdir: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"--workdir={workdir} is not writable ({error.strerror}); choose another") from None


def attempts(workdir: epath.Path) -> int:
    """How many attempts have started here before."""
    metrics = workdir / "metrics.jsonl"
    return sum(event["event"] == "start" for event in read_events(metrics)) if metrics.exists() else 0


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each asked for while the one before is being used."""
    item = next(items)
    for following in items:
        yield item
        item = following
    yield item


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
        self.scorer = parts.float32(self.cfg.model)
        self.validation = {
            name: dataset.split("valid")
            for name, dataset in data.datasets.items()
            if "valid" in dataset.manifest.splits
        }
        self.evaluate_batch = self.cfg.train.evaluate_batch or self.cfg.train.batch
        self.evaluations: dict[int, dict[str, Any]] = {}
        """By step, what evaluation found."""

    def train(self) -> int:
        """Returns the exit code; the trackers learn how it ended even when it raises."""
        self.watchdog.beat("restoring")
        state = self.start_or_resume()
        self.attempt = attempts(self.workdir)
        self.ledger: Ledger | None = None
        if distributed.leads():
            seal.write_atomically(self.workdir / "config.json", configs.to_json(self.cfg))
            self.data.tokenizer.save(self.workdir / "tokenizer")
            self.ledger = Ledger(self.workdir / "ledger.jsonl")
        self.trackers = self.make_trackers()
        self.trackers.start(self.information())
        status: Status = "failed"
        try:
            state, reached = self.loop(state)
            status = "finished" if reached == self.cfg.train.steps else "preempted"
            self.end(state, reached)
        except NumericalError:
            status = "diverged"
            raise
        finally:
            if self.ledger is not None:
                self.ledger.close()
            self.trackers.close(status)
        if distributed.leads():
            write_report(self.workdir, defaults=dataclasses.asdict(Config()))
        if status == "preempted":
            print(f"preempted: step {reached} is saved; run the same command again to go on")
            return PREEMPTED
        print(f"report: {self.workdir / 'report.md'}   loss plot: {self.workdir / 'loss.png'}")
        return DONE

    def start_or_resume(self) -> TrainState:
        """The state to go on from; sets the accounting and the loader to match it."""
        restored = self.checkpoints.restore(parts.abstract_state(self.experiment))
        if restored is None:
            state, data, step = parts.initial_state(self.experiment), 0, 0
        else:
            state, meta, step = restored
            data = meta["data"]
            # A changed config was allowed explicitly: what is scalar in it counts from here on.
            train = self.cfg.train
            scalars = hyper(self.cfg.optimizer, steps=train.steps, seed=train.seed)
            state = state.replace(hyper=jax.device_put(scalars, jax.tree.map(lambda x: x.sharding, state.hyper)))
            print(f"resuming {self.workdir} from step {step}")
        self.loader = Loader(
            self.cfg.data,
            batch_size=self.cfg.train.batch,
            rows=parts.local_rows(self.experiment.mesh, self.cfg.train.batch),
            start=data,
            allow_data_change=self.options.allow_data_change,
        )
        if distributed.share("the data", self.loader.fingerprint) != self.loader.fingerprint:
            raise DataError("the data here are not those of process 0; give all processes the same files")
        self.accounting = self.make_accounting(step, self.loader.next_sample)
        return state

    def make_accounting(self, step: int, first_sample: int) -> Accounting:
        device = jax.devices()[0]
        peak = peak_flops(device.device_kind)
        mesh = self.experiment.mesh
        return Accounting(
            start=step,
            first_sample=first_sample,
            batch=self.cfg.train.batch,
            tokens_per_sequence=self.cfg.data.seq_len,
            flops_per_sequence=sequence_flops(self.experiment.model, self.cfg.data.seq_len).causal,
            peak_flops=None if peak is None else peak * (1 if mesh is None else mesh.size),
        )

    def loop(self, state: TrainState) -> tuple[TrainState, int]:
        train_cfg = self.cfg.train
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
            parts.compiled_step(self.experiment),
            self.batches(),
            start=self.accounting.start,
            steps=train_cfg.steps,
            reader=reader,
            periodic=self.periodic(),
            stop=self.stop(),
            watchdog=self.watchdog,
        )

    def stop(self) -> Callable[[], bool]:
        """Whether to stop after this step: on a signal, to any of the processes."""
        if distributed.processes() == 1:
            return lambda: self.preemption.requested
        vote = distributed.Vote()
        return lambda: vote(self.preemption.requested)

    def batches(self) -> Iterator[Batch]:
        """Batches on the devices, each written to the ledger before it is used."""
        size = self.cfg.train.batch
        placed = self.placed_batches()
        for step, (batch, crcs_B) in enumerate(placed, self.accounting.start + 1):
            if self.ledger is not None:
                crc = joined_crc(np.asarray(crcs_B), 4 * self.cfg.data.seq_len)
                self.ledger.record(self.attempt, step, self.accounting.samples(step - 1), size, crc)
            yield batch

    def placed_batches(self) -> Iterator[tuple[Batch, Any]]:
        """Batches on the devices, with the CRC of each of their rows from the process that feeds it.

        Several processes need a collective to learn the others' CRCs. It is sent off one batch ahead: then it is done
        by the time that it is read, and the devices never wait for the ledger.
        """
        mesh = self.experiment.mesh
        place = parts.placer(mesh, self.cfg.train.batch)

        def with_crcs(batch: Batch) -> tuple[Batch, Any]:
            crcs_B = row_crcs(batch.tokens_BT)
            return place(batch), crcs_B if distributed.processes() == 1 else parts.everywhere(mesh, place(crcs_B))

        placed = map(with_crcs, self.loader)
        return placed if distributed.processes() == 1 else one_ahead(placed)

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
        """Score the same batches every time, as `val/`; at the end also the whole sets, as `val_full/`."""
        limit = self.cfg.train.evaluate_batches
        results = self.score(step, state, limit)
        metrics: dict[str, Any] = parts.evaluation_metrics(results)
        metrics |= {f"data/{name}/valid_digest": result.digest for name, result in results.items()}
        if step == self.cfg.train.steps:
            whole = results if limit is None else self.score(step, state, None)
            metrics |= parts.evaluation_metrics(whole, "val_full")
        self.evaluations[step] = metrics
        self.trackers.log(step, {**self.accounting.totals(step), **metrics})

    def score(self, step: int, state: TrainState, limit: int | None) -> dict[str, Evaluation]:
        """Every validation set, or its first `limit` batches, under the parameters of `step`."""
        return {
            name: parts.evaluate_split(
                self.scorer,
                state.params,
                split,
                self.cfg.data,
                batch=self.evaluate_batch,
                limit=limit,
                mesh=self.experiment.mesh,
                on_batch=functools.partial(self.watchdog.beat, f"evaluation of {name} at step {step}"),
            )
            for name, split in self.validation.items()
        }

    def sample(self, step: int, state: TrainState) -> None:
        if not self.cfg.train.sample.prompts:
            return
        params = parts.on_one_device(self.experiment.mesh, state.params)
        if not distributed.leads():
            return
        try:
            text = parts.sample_text(self.experiment.model, params, self.data.tokenizer, self.cfg.train.sample)
        except Exception as error:  # a text to look at; what was trained is worth more
            logger.warning("no sample at step %d: %s: %s", step, type(error).__name__, " ".join(str(error).split()))
            return
        (self.workdir / "samples").mkdir(exist_ok=True)
        (self.workdir / "samples" / f"{step}.txt").write_text(text)

    def save(self, step: int, state: TrainState) -> None:
        if self.ledger is not None:
            self.ledger.sync()
        meta = {
            "data": self.loader.state(self.accounting.samples(step)),
            "config": configs.digest(self.cfg),
            **self.accounting.totals(step),
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

    def end(self, state: TrainState, reached: int) -> None:
        """Make sure that what was reached is sealed; of a finished run, write the summary."""
        self.watchdog.beat("the last checkpoint")
        if self.checkpoints.last_step != reached:
            self.save(reached, state)
        self.checkpoints.wait()
        if reached < self.cfg.train.steps:
            return
        if reached not in self.evaluations:  # an earlier attempt died between its last checkpoint and its summary
            self.evaluate(reached, state)
            self.sample(reached, state)
        if distributed.leads():
            self.finish(reached)

    def finish(self, reached: int) -> None:
        """Write the summary: then the run is finished."""
        summary = self.summary(reached)
        if self.cfg.train.compression_baseline:
            self.watchdog.beat("compressing the validation text")
            summary |= parts.compression_baselines(self.data)
        self.trackers.summary(summary)
        seal.write_atomically(self.workdir / "summary.json", json.dumps(summary, indent=1))
        self.print_summary(summary)

    def summary(self, step: int) -> dict[str, Any]:
        counts = count(self.experiment.model.spec)
        samples = self.accounting.samples(step)
        flops = sequence_flops(self.experiment.model, self.cfg.data.seq_len)
        return {
            "status": "finished",
            "step": step,
            "seed": self.cfg.train.seed,
            "params/total": counts.total,
            "params/non_embedding": counts.non_embedding,
            "params/matmul": counts.matmul,
            "params/active": counts.active,
            "tokens": samples * self.cfg.data.seq_len,
            "flops_6nd": samples * flops.six_nd,
            "flops_causal": samples * flops.causal,
            "flops_full": samples * flops.full,
            **{f"epochs/{name}": epochs for name, epochs in self.loader.epoch(samples).items()},
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
        if not distributed.leads():
            return Trackers([])
        trackers: list[Tracker] = [JsonlTracker(self.workdir / "metrics.jsonl"), ConsoleTracker()]
        if self.cfg.tracking.wandb != "off":
            name = self.cfg.tracking.name or self.workdir.name
            run_id = configs.digest(self.cfg, str(self.workdir))  # the same for every restart, which rejoins the run
            trackers.append(WandbTracker(self.cfg.tracking, run_id, name, self.workdir))
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
            "environment": runtime.environment(),
        }
