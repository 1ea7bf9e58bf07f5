"""Where numbers go: metrics.jsonl is the truth, the console and wandb are views of it that may fail.

    {"event": "start", "time": ..., "step": 0, ...}              one per attempt; "step" is where it (re)starts
    {"step": 10, "time": ..., "tokens": 81920, "train/loss": 5.1}   one per log step
    {"event": "summary", ...}  {"event": "end", "status": "finished"}

Lines of an earlier attempt beyond the step that a later one started from count no more.
"""

import contextlib
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmjax.errors import LmjaxError
from lmjax.jsonl import JsonLines, read_lines
from lmjax.schema import config_class

logger = logging.getLogger(__name__)

Status = Literal["finished", "preempted", "diverged", "failed"]


@config_class
class TrackingConfig:
    """Weights & Biases; metrics.jsonl and the console are always there."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Online falls back to offline without a network or a key; `wandb sync` uploads later."""
    project: str = "lmjax"
    entity: str | None = None
    group: str | None = None
    """The sweep or experiment that this run belongs to."""
    tags: tuple[str, ...] = ()
    name: str | None = None
    """A short human name; None lets the run choose one from its config."""


class Tracker(Protocol):
    """Raises LmjaxError only if training must stop; any other failure is the tracker's own."""

    def start(self, info: Mapping[str, Any]) -> None:
        """An attempt begins. `info["step"]` is the step it starts from, `info["steps"]` the last one planned."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of one step, `tokens` and `flops` among them."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers of the run."""

    def close(self, status: Status) -> None:
        """The attempt ends."""


class Trackers:
    """Several trackers as one. A view that fails is dropped with one warning; training goes on."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        self._trackers = list(trackers)

    def start(self, info: Mapping[str, Any]) -> None:
        clean = redact(info)
        self._each(lambda tracker: tracker.start(clean))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.log(step, values))

    def summary(self, values: Mapping[str, Any]) -> None:
        clean = redact(values)
        self._each(lambda tracker: tracker.summary(clean))

    def close(self, status: Status) -> None:
        self._each(lambda tracker: tracker.close(status))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except LmjaxError:
                raise
            except Exception as error:
                self._trackers.remove(tracker)
                logger.warning("%s failed and is off from here on: %r", type(tracker).__name__, error)


# --- Secrets ----------------------------------------------------------------------------------------------------------

REDACTED = "<redacted>"
# Counted tokens and the key under which a text lies are settings. Of the environment, which is not ours, all is hidden.
_SECRET_WORDS = r"(?:token(?!s\b|i[sz])|(?<!text[_-])key|secret|passw|credential)"
_SECRET_NAME = re.compile(_SECRET_WORDS, re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"token(?!i[sz])|key|secret|passw|credential", re.IGNORECASE)
_SECRET_FLAG = re.compile(rf"(-[\w.\-]*{_SECRET_WORDS}[\w.\-]*[= ])(\S+)", re.IGNORECASE)


def redact(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without secrets, for everything that leaves the process.

    Hidden are text under a name with token, key, secret, password or credential in it (numbers there are no secrets,
    nor is what our own settings hold: `tokens`, `text_key`, `tokenizer`), command-line flags of such names, and the
    value of any environment variable so named wherever it occurs.
    """
    known = [value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= 8]

    def clean(value: Any, secret: bool) -> Any:
        if isinstance(value, Mapping):
            return {name: clean(child, secret or bool(_SECRET_NAME.search(str(name)))) for name, child in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(child, secret) for child in value]
        if not isinstance(value, (str, bytes)):
            return value
        if secret or isinstance(value, bytes):
            return REDACTED
        for text in known:
            value = value.replace(text, REDACTED)
        return _SECRET_FLAG.sub(rf"\g<1>{REDACTED}", value)

    return clean(values, secret=False)


# --- The truth --------------------------------------------------------------------------------------------------------


def read_jsonl(path: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in the order of their steps, one per step, across restarts.

    A later line of the same step overrides the values it repeats, and an attempt overrides whatever earlier ones
    logged after the step that it started from.
    """
    rows: dict[int, dict[str, Any]] = {}
    for record in read_lines(path):
        if record.get("event") == "start":
            rows = {step: row for step, row in rows.items() if step <= record.get("step", step)}
        elif "event" not in record and isinstance(record.get("step"), int):
            rows.setdefault(record["step"], {}).update(record)
    return [rows[step] for step in sorted(rows)]


def read_events(path: epath.PathLike) -> list[dict[str, Any]]:
    """The start, summary and end records of metrics.jsonl in the order they were written."""
    return [record for record in read_lines(path) if "event" in record]


class JsonlTracker:
    """metrics.jsonl: everything that was logged, by every attempt."""

    def __init__(self, path: epath.PathLike) -> None:
        self._lines = JsonLines(path)

    def start(self, info: Mapping[str, Any]) -> None:
        self._lines.write({"event": "start", "time": time.time(), **info})

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._lines.write({"step": step, "time": time.time(), **values})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._lines.write({"event": "summary", "time": time.time(), **values})

    def sync(self) -> None:
        self._lines.sync()

    def close(self, status: Status) -> None:
        self._lines.write({"event": "end", "time": time.time(), "status": status})
        self._lines.close()


# --- The console ------------------------------------------------------------------------------------------------------


class ConsoleTracker:
    """One live line on a terminal; in a log, one plain line per log step. Evaluations stay visible in both."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._clock: tuple[float, int] = (0.0, 0)
        self._steps = 0

    def start(self, info: Mapping[str, Any]) -> None:
        self._steps = info["steps"]
        self._clock = (time.monotonic(), info["step"])
        if sys.stdout.isatty():
            columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self._progress = Progress(*columns, refresh_per_second=4)
            self._progress.start()
            self._task = self._progress.add_task("", total=self._steps, completed=info["step"], text="compiling")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        scores = {name: value for name, value in values.items() if name.startswith(("val/", "val_full/"))}
        evaluation = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        if evaluation:
            self._print(f"step {step}  {evaluation}")
        text = _line(values)
        if not text:
            return
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
        else:
            self._print(f"step {step}/{self._steps}  {text}  ETA {self._eta(step)}")

    def summary(self, values: Mapping[str, Any]) -> None:
        pass

    def close(self, status: Status) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _print(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def _eta(self, step: int) -> str:
        since, start = self._clock
        seconds = round((time.monotonic() - since) / max(1, step - start) * (self._steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _line(values: Mapping[str, Any]) -> str:
    """The few numbers that a person watches."""
    formats: dict[str, Callable[[float], str]] = {
        "train/loss": lambda x: f"loss {x:.4f}",
        "optim/lr": lambda x: f"lr {x:.2e}",
        "perf/tokens_per_sec": lambda x: f"{x / 1e3:,.1f}k tok/s",
        "perf/mfu": lambda x: f"MFU {100 * x:.1f}%",
    }
    return "  ".join(show(values[name]) for name, show in formats.items() if name in values)


# --- wandb ------------------------------------------------------------------------------------------------------------


class WandbTracker:
    """A Weights & Biases run that training never waits for.

    All calls run in order on a thread of their own. A call that raises, or a queue that fills up because one hangs,
    turns the tracker off with one warning. Only process 0 makes one.
    """

    _INIT_SECONDS = 15
    _CLOSE_SECONDS = 60

    def __init__(self, cfg: TrackingConfig, run_id: str, name: str, workdir: epath.PathLike) -> None:
        """`run_id` is the same for every restart of a run, which rejoins it."""
        self._cfg, self._run_id, self._name, self._workdir = cfg, run_id, name, os.fspath(workdir)
        self._run: Any = None
        self._off = False
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=10_000)
        self._thread = threading.Thread(target=self._work, name="lmjax-wandb", daemon=True)
        self._thread.start()

    def start(self, info: Mapping[str, Any]) -> None:
        self._submit(lambda: self._init(dict(info)))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._submit(lambda: self._run.log(dict(values), step=step))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._submit(lambda: self._run.summary.update(dict(values)))

    def close(self, status: Status) -> None:
        """Waits a bounded time for what is left to be written or uploaded."""
        self._submit(lambda: self._finish(status))
        self._submit(None)
        if self._off:
            return
        self._thread.join(self._CLOSE_SECONDS)
        if self._thread.is_alive():
            self._turn_off(f"still busy after {self._CLOSE_SECONDS} s")

    def _submit(self, call: Callable[[], None] | None) -> None:
        if self._off:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._turn_off("it does not answer")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                self._turn_off(repr(error))
            if self._off:
                return

    def _turn_off(self, why: str) -> None:
        if not self._off:
            self._off = True
            logger.warning("wandb is off from here on (%s); metrics.jsonl has everything", why)
            # Left to itself wandb would wait for its dead or stuck service when the process exits.
            threading.Thread(target=_tear_down, name="lmjax-wandb-teardown", daemon=True).start()

    def _init(self, info: dict[str, Any]) -> None:
        if self._cfg.wandb == "offline" or not self._try_online(info):
            self._open("offline", info)
            logger.warning("wandb records offline; upload with:  wandb sync %s", self._run.settings.sync_dir)
        self._run.define_metric("tokens")
        self._run.define_metric("flops")
        self._run.define_metric("*", step_metric="tokens")

    def _try_online(self, info: dict[str, Any]) -> bool:
        import wandb

        try:
            self._open("online", info)
        except wandb.Error as error:  # no key, no network, no such entity
            logger.warning("wandb cannot be reached: %s", " ".join(str(error).split())[:200])
            _tear_down()  # else the service holds the run id
            return False
        return True

    def _open(self, mode: Literal["online", "offline"], info: dict[str, Any]) -> None:
        import wandb

        # Silent also keeps wandb from prompting for a key; console capture and metadata would record secrets.
        settings = wandb.Settings(
            silent=True, console="off", save_code=False, x_disable_meta=True, init_timeout=self._INIT_SECONDS
        )
        self._run = wandb.init(
            project=self._cfg.project,
            entity=self._cfg.entity,
            group=self._cfg.group,
            tags=list(self._cfg.tags),
            job_type="pretrain",
            name=self._cfg.name or self._name,
            id=self._run_id,
            resume="allow",
            mode=mode,
            dir=self._workdir,
            config=info,
            settings=settings,
        )

    def _finish(self, status: Status) -> None:
        self._run.summary["status"] = status
        if status == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status == "finished" else 1)
        _tear_down()  # only now is an offline run wholly on the disk


def _tear_down() -> None:
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()
