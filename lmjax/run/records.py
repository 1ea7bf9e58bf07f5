"""What a run writes of itself as it goes: config, ledger, metrics, summary. Process 0 alone writes."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from lmjax import config as configs
from lmjax.errors import visible
from lmjax.process import group, start_up
from lmjax.process.faults import fault
from lmjax.process.redact import hide, redact
from lmjax.record import files, formats
from lmjax.record.console import ConsoleTracker
from lmjax.record.jsonl import plain
from lmjax.record.ledger import Ledger
from lmjax.record.tracking import JsonlTracker, Status, Tracker, Trackers
from lmjax.record.wandb_tracker import WandbTracker
from lmjax.run import assemble
from lmjax.run.assemble import Experiment
from lmjax.run.progress import Progress
from lmjax.run.workdir import SUMMARY_FORMAT
from lmjax.tasks.task import Task
from lmjax.weights import count


class Records:
    """The open files and trackers of one attempt; at other processes than 0 every method does nothing."""

    def __init__(self, workdir: epath.Path, experiment: Experiment, run_id: str) -> None:
        task = experiment.task
        self.workdir, self.experiment, self.task = workdir, experiment, task
        self.ledger: Ledger | None = None
        self.trackers = Trackers([])
        self._appended: list[Ledger | JsonlTracker] = []
        if not group.is_leader():
            return
        configs.write_json(workdir / "config.json", task.cfg)
        task.write_files(workdir)
        self.ledger, metrics = Ledger(workdir / "ledger.jsonl"), JsonlTracker(workdir / "metrics.jsonl")
        self._appended = [self.ledger, metrics]
        views: list[Tracker] = [ConsoleTracker()]
        tracking = task.cfg.tracking
        if tracking.wandb != "off":
            shown = dataclasses.replace(tracking, **hide(dataclasses.asdict(tracking)))
            views.append(WandbTracker(shown, run_id, hide(tracking.name or workdir.name), workdir))
        self.trackers = Trackers([metrics, *views])

    def log_start(self, progress: Progress, attempt: int, command: str) -> None:
        """Tell the trackers what this attempt is, when it starts."""
        cfg, counts = self.task.cfg, count(self.task.spec)
        whole = progress.accounting.spent(cfg.train.steps)
        progress.warn_of_repeats(whole.samples)
        attends = assemble.attends(self.experiment)
        self.trackers.start(
            {
                "step": progress.start_step,
                "steps": cfg.train.steps,
                "attempt": attempt,
                "command": command,
                "workdir": str(self.workdir),
                "config": redact(dataclasses.asdict(cfg)),
                "params": dataclasses.asdict(counts),
                "N": counts.active,
                "D": whole.tokens,
                "C": whole.flops_causal,
                **({"attention": attends} if attends else {}),
                **self.task.about,
                **({} if cfg.train.init_from is None else {"start": self.task.start.digest()}),
                "environment": start_up.environment(),
            }
        )

    def sync(self) -> None:
        """Force what was appended to the storage: before a checkpoint is sealed."""
        for one in self._appended:
            one.sync()

    def finish(self, progress: Progress, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the summary: then the run is finished. `metrics` are those of the last evaluation."""
        summary = {**summarize(self.task, progress, step), **metrics, **self.task.baselines()}
        self.trackers.summary(summary)
        self.sync()
        fault("summary.write")
        stamped = formats.stamp(SUMMARY_FORMAT) | plain(summary)
        files.write_atomically(self.workdir / "summary.json", json.dumps(stamped, indent=1))
        for key, value in summary.items():
            if key.startswith(("val/", "val_full/")):
                print(f"{key} {value:.4f}")
        sample = self.workdir / "samples" / f"{step}.txt"
        if sample.exists():
            print(visible(sample.read_bytes().decode(errors="replace")))

    def close(self, status: Status) -> None:
        if self.ledger is not None:
            self.ledger.close()
        self.trackers.close(status)


def summarize(task: Task, progress: Progress, step: int) -> dict[str, Any]:
    """What training up to `step` cost."""
    counts, spent = count(task.spec), progress.accounting.spent(step)
    return {
        "status": "finished",
        "step": step,
        "seed": task.cfg.train.seed,
        "params/total": counts.total,
        "params/non_embedding": counts.non_embedding,
        "params/matmul": counts.matmul,
        "params/active": counts.active,
        **({} if task.frozen is None else {"params/frozen": count(task.frozen.spec).total}),
        "tokens": spent.tokens,
        "flops_6nd": spent.flops_6nd,
        "flops_causal": spent.flops_causal,
        "flops_full": spent.flops_full,
        **{f"epochs/{name}": epochs for name, epochs in progress.epochs(spent.samples).items()},
        "data/fingerprint": progress.source.fingerprint,
    }
