"""Many runs in one process, through one compiled step: `lmjax train SHARED -- RUN -- RUN`.

Each has a thread, in which it is the run that it would be alone, with its own work directory and its own end. They set
up one after another, so that what one has compiled or prepared the next one finds. Then they share the step of their
device; where there are several devices, the runs are dealt out to them.

    side by side   on CPUs: each calls the same program for itself, as many at a time as there are cores. To the bit
                   what it computes alone.
    stacked        on accelerators: all meet at each step, and take it as one, by vmap. Equal to rounding. A run that
                   ends leaves, and the step is compiled anew for those that stay.
"""

import contextlib
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from lmjax.cells import check_together
from lmjax.config import Config
from lmjax.errors import DONE, PREEMPTED, ConfigError
from lmjax.metrics import Metrics
from lmjax.process import ending, labels, start_up
from lmjax.process.redact import hide
from lmjax.process.signals import Preemption, Watchdog
from lmjax.record import files
from lmjax.run import assemble, run
from lmjax.run.assemble import Experiment
from lmjax.run.run import Options, Runtime
from lmjax.train.state import TrainState
from lmjax.weights import Params

Inputs = tuple[TrainState, Params, Any]
Outputs = tuple[TrainState, Metrics]


class Member(NamedTuple):
    """One run of a stack."""

    cfg: Config
    workdir: epath.Path
    options: Options


def train(members: Sequence[Member], share: "Callable[[Iterable[int]], SharedStep] | None" = None) -> int:
    """Train all of them, or go on with them. Each says how it ended as its last line on stderr.

    `share` makes what runs of these numbers step by; by default what suits the device. Returns 75 if any is to go on,
    otherwise the code of the first that failed. Raises ConfigError, before any of them starts, for runs that cannot
    train together.
    """
    check(members)
    share = share or (SideBySide if jax.default_backend() == "cpu" else Stacked)
    devices = jax.devices()[: len(members)]
    steps = [share(range(place, len(members), len(devices))) for place in range(len(devices))]
    timeout = max(member.cfg.train.step_timeout for member in members)
    with Preemption() as preemption, Watchdog(timeout) as watchdog, labels.labelling():
        common = Common(preemption, watchdog, turn=threading.Lock())
        lanes = [
            Lane(common, number, member, label, devices[number % len(devices)], steps[number % len(devices)])
            for number, (member, label) in enumerate(zip(members, names(members), strict=True))
        ]
        threads = [threading.Thread(target=lane.run, name=f"lmjax-{lane.label}") for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    codes = [lane.code for lane in lanes]
    return PREEMPTED if PREEMPTED in codes else next((code for code in codes if code != DONE), DONE)


def check(members: Sequence[Member]) -> None:
    for member in members:
        check_together(member.cfg, members[0].cfg)
    places = Counter(files.absolute(member.workdir) for member in members)
    place, times = places.most_common(1)[0]
    if times > 1:
        raise ConfigError(f"--workdir={place} is that of {times} runs; give each its own")


def names(members: Sequence[Member]) -> list[str]:
    """What each is called: the name of its work directory, or the whole path where two have the same."""
    short = [member.workdir.name for member in members]
    return short if len(set(short)) == len(short) else [str(member.workdir) for member in members]


# The runs ---------------------------------------------------------------------------------------------------------


class Common(NamedTuple):
    """What all runs have in common."""

    preemption: Preemption
    watchdog: Watchdog
    turn: threading.Lock
    """Held by the run that sets up."""


class Lane:
    """One run in its thread."""

    def __init__(
        self, common: Common, number: int, member: Member, label: str, device: jax.Device, step: "SharedStep"
    ) -> None:
        self.common, self.number, self.member, self.label = common, number, member, label
        self.device, self.step = device, step
        self.code = PREEMPTED
        self._sets_up = True

    def run(self) -> None:
        with labels.under(self.label), jax.default_device(self.device):
            self.common.turn.acquire()
            try:
                with ending.within_memory("the number of runs, train.batch, data.seq_len or the model's size"):
                    if not self.common.preemption.requested:
                        self.code = run.run(*self.member, make_runtime=self.runtime)
            except (Exception, KeyboardInterrupt) as error:
                self.code, said = ending.explained(error)
                print(f"lmjax: error: {hide(said)}", file=sys.stderr)
            finally:
                self.is_set_up()
                self.step.leave(self.number)
            labels.ended(self.code)

    @contextlib.contextmanager
    def runtime(self, experiment: Experiment) -> Iterator[Runtime]:
        """The handlers that all runs share, and a step that is this run's part of the shared one."""
        self.step.join(experiment)

        def train_step(state: TrainState, frozen: Params, batch: Any) -> Outputs:
            self.is_set_up()
            return self.step(self.number, (state, frozen, batch))

        yield Runtime(self.common.preemption, self.common.watchdog, train_step)

    def is_set_up(self) -> None:
        """Give the turn to set up to the next run."""
        if self._sets_up:
            self._sets_up = False
            self.common.turn.release()


# The step that they share -----------------------------------------------------------------------------------------


class SharedStep(ABC):
    """What runs on one device step by. Each calls it in a thread of its own, with its number."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._first: Config | None = None

    def join(self, experiment: Experiment) -> None:
        """One run after another says what it is. Raises ConfigError for one that turns out not to fit the first."""
        if self._first is None:
            self._first = experiment.cfg
            self.prepare(experiment)
        check_together(experiment.cfg, self._first)

    @abstractmethod
    def prepare(self, experiment: Experiment) -> None:
        """Make the step of any of them: they differ in nothing that it is compiled for."""

    @abstractmethod
    def __call__(self, number: int, inputs: Inputs) -> Outputs: ...

    def leave(self, number: int) -> None:  # noqa: B027
        """This run takes no more steps."""


class SideBySide(SharedStep):
    """One program that each run calls for itself, as many of them at a time as this process has cores."""

    def __init__(self, numbers: Iterable[int]) -> None:
        super().__init__(numbers)
        self._room = threading.Semaphore(start_up.cpu_cores())

    def prepare(self, experiment: Experiment) -> None:
        self._step = assemble.compiled_step(experiment)

    def __call__(self, number: int, inputs: Inputs) -> Outputs:
        with self._room:
            return jax.block_until_ready(self._step(*inputs))


class Stacked(SharedStep):
    """All runs that are left meet at each step and take it as one; the last to come calls it for all."""

    def __init__(self, numbers: Iterable[int]) -> None:
        super().__init__(numbers)
        self._left = set(numbers)
        self._changed = threading.Condition()
        self._given: dict[int, Inputs] = {}
        self._made: dict[int, Outputs | Exception] = {}

    def prepare(self, experiment: Experiment) -> None:
        self._step = assemble.stacked_step(experiment)

    def __call__(self, number: int, inputs: Inputs) -> Outputs:
        with self._changed:
            self._given[number] = inputs
            self._step_if_all_are_here()
            self._changed.wait_for(lambda: number in self._made)
            made = self._made.pop(number)
        if isinstance(made, Exception):
            raise made
        return made

    def leave(self, number: int) -> None:
        with self._changed:
            self._left.remove(number)
            self._step_if_all_are_here()

    def _step_if_all_are_here(self) -> None:
        if not self._given or self._given.keys() != self._left:
            return
        numbers = sorted(self._given)
        try:
            made = self._step(*zip(*(self._given[number] for number in numbers), strict=True))
            self._made |= dict(zip(numbers, made, strict=True))
        except Exception as error:  # is each run's
            self._made |= dict.fromkeys(numbers, error)
        self._given = {}
        self._changed.notify_all()
