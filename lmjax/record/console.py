"""The progress of a run on a terminal, or as plain lines."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmjax.record.tracking import Status


class ConsoleTracker:
    """One live line on a terminal; in a log, one plain line per log step. Evaluations stay visible in both."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._clock: tuple[float, int] | None = None
        """Where the rate is measured from: the first line, for what comes before compiles."""
        self._steps = 0

    def start(self, info: Mapping[str, Any]) -> None:
        self._steps = info["steps"]
        if "attention" in info:
            print(f"attention: {info['attention']}", flush=True)
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
            self._print(f"step {step}/{self._steps}  {text}{self._eta(step, values.get('perf/step_time'))}")

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

    def _eta(self, step: int, step_time: float | None) -> str:
        """The time left, by the steps since the first line, and by its own `step_time` on the first."""
        if self._clock is None:
            self._clock = time.monotonic(), step
        else:
            since, start = self._clock
            step_time = (time.monotonic() - since) / max(1, step - start)
        if step_time is None:
            return ""
        seconds = round(step_time * (self._steps - step))
        return f"  ETA {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _line(values: Mapping[str, Any]) -> str:
    """The few numbers that a person watches."""
    formats: dict[str, Callable[[float], str]] = {
        "train/loss": lambda x: f"loss {x:.4f}",
        "optim/lr": lambda x: f"lr {x:.2e}",
        "perf/tokens_per_sec": lambda x: f"{x / 1e3:,.1f}k tok/s",
        "perf/mfu": lambda x: f"MFU {100 * x:.1f}%",
    }
    return "  ".join(show(values[name]) for name, show in formats.items() if name in values)
