"""What an engine starts: a job is one cell of a sweep, or a stack of them, whichever machine it runs on.

    python -m launch cell DIR 3

trains cell 3 of the sweep in DIR, or goes on with it; finished, it does nothing. SIGTERM makes it save and exit with
75, and then the same command goes on. Other exit codes are final until somebody starts the sweep again: 0 done, 2
config, 3 data, 4 storage, 5 diverged, 6 a peer lost. An engine has to run that command on every host of the job, to run
it again after 75, 6 and the loss of a machine, and to give it time to save. It needs to know nothing else.

`cell DIR 3,4,5` trains those together. Its code is 75 while one of them is to go on, otherwise that of the first that
failed.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from launch.manifest import Entry
from lmjax.errors import PREEMPTED, StallError

RETRIED = (PREEMPTED, StallError.exit_code)
"""The exit codes after which the same command goes on where it stopped."""

MAX_RESTARTS = 100
"""Of one job by its engine: a machine that ends it at once each time must not do so for ever."""


class Hardware(NamedTuple):
    """What one job runs on."""

    accelerator: str | None = None
    """As `lmjax plan` names TPU slices, `v5e-16` or `2xv5p-256`, or GPUs, `H100-8`; None is CPUs."""
    nodes: int = 1
    """Hosts, for engines that do not derive them from the accelerator; each runs the command once."""
    spot: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """One cell, or a stack of them."""

    index: int
    """Of the first."""
    name: str
    """Of the sweep and the cell; at most 40 of a-z, 0-9 and -, as Kubernetes wants it."""
    command: tuple[str, ...]
    environment: Mapping[str, str]
    flops: float
    """What is left of its price; the dearest go first."""
    after: int | None = None
    """The cell that has to end before it starts."""
    others: tuple[int, ...] = ()
    """The cells that train with the first."""

    @property
    def cells(self) -> tuple[int, ...]:
        return (self.index, *self.others)


class Engine(Protocol):
    """A file of `launch/engines`; `python -m launch sweep --engine=NAME` chooses it."""

    WAITS: bool
    """Whether `submit` returns when the jobs have ended; then it starts those that come after others, too."""

    def add_arguments(self, parser: argparse._ActionsContainer) -> None:
        """Flags of its own, such as a partition or an image."""

    def render(
        self, name: str, directory: str, jobs: Sequence[Job], hardware: Hardware, arguments: argparse.Namespace
    ) -> dict[str, str]:
        """The files that it gives its own tool, by name: what `--dry-run` shows. Nothing is written yet.

        Raises ConfigError for flags that do not fit.
        """

    def submit(
        self, name: str, directory: str, jobs: Sequence[Job], hardware: Hardware, arguments: argparse.Namespace
    ) -> int:
        """Start the jobs of the sweep called `name` in `directory`; returns an exit code.

        Raises ConfigError where the engine's tool is missing or refuses.
        """

    def stop(self, name: str, directory: str, jobs: Sequence[Job]) -> int:
        """Ask those that wait or run to save and end."""


def of(name: str, directory: str, cells: Sequence[Entry], after: int | None = None) -> Job:
    """The job of cells of the sweep called `name`, run by this interpreter."""
    first, *others = (cell.index for cell in cells)
    command = (sys.executable, "-m", "launch", "cell", directory, ",".join(map(str, (first, *others))))
    flops = sum(cell.own_flops for cell in cells)
    return Job(first, dns_name(name[:34], str(first)), command, {}, flops, after, tuple(others))


def dns_name(*words: str) -> str:
    """At most 40 of a-z, 0-9 and -, beginning with a letter: what clusters take as a name."""
    text = re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
    return (text if text[:1].isalpha() else f"s-{text}")[:40].rstrip("-")
