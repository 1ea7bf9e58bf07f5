"""How far a run is: what its steps have cost, and where they stand in the data."""

import logging
from collections.abc import Mapping
from typing import Any, NotRequired

import jax
import pydantic
from typing_extensions import TypedDict

from lmjax.devices.chips import peak_flops
from lmjax.errors import CheckpointError
from lmjax.process import group
from lmjax.schema import NonNegativeFloat, NonNegativeInt, first_problem
from lmjax.tasks.task import Frozen, Source, Task
from lmjax.train.accounting import Accounting, Cost

logger = logging.getLogger(__name__)

MOST_EPOCHS = 40
"""So often the same text may be read for any use, about: Muennighoff et al. 2023, figure 1."""


class Counts(TypedDict):
    """A Cost as JSON."""

    samples: NonNegativeInt
    tokens: int
    flops_6nd: int
    flops_causal: int
    flops_full: int


class Meta(TypedDict):
    """What a checkpoint keeps of its run beside its state, as far as it is read again. Older ones do not have all."""

    data: dict[str, Any]
    """The state of the source, which is its own to check."""
    tokens: int
    flops: int
    counts: NotRequired[Counts]
    epochs: NotRequired[dict[str, NonNegativeFloat]]
    epochs_before: NotRequired[dict[str, NonNegativeFloat]]
    evaluation_owed: NotRequired[bool]
    drawn_evaluations: NotRequired[bool]
    """Whether the batches of evaluations are drawn from the whole set; older ones are its first."""
    run: NotRequired[str]
    """Names it: see `workdir.run_id`."""
    base: NotRequired[str | None]
    """Names the frozen weights that it stands on: see `Frozen.check_same`."""
    identity: NotRequired[str]
    """Names its config: see `workdir.identity`."""
    left_out: NotRequired[list[list[NonNegativeInt]]]
    """[first sample, how many] of those that rollbacks left out."""


def check_meta(meta: Mapping[str, Any], step: int, frozen: Frozen | None = None) -> None:
    """Raise CheckpointError for what no run has kept in a checkpoint, or one that stands on other frozen weights."""
    try:
        pydantic.TypeAdapter(Meta).validate_python(meta, strict=True)
    except pydantic.ValidationError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} is not that of a run: meta.{first_problem(error)}; use another step"
        ) from None
    if frozen is not None:
        frozen.check_same(meta, f"the checkpoint of step {step}")


class Progress:
    """Progress is counted on from the checkpoint that an attempt starts from."""

    def __init__(self, task: Task, source: Source, step: int, meta: Mapping[str, Any], *, devices: int) -> None:
        """`meta` is what the checkpoint of `step` kept; it is empty at the start of a run."""
        self.source = source
        self._base = {} if task.frozen is None else {"base": task.frozen.start.digest()}
        peak = peak_flops(jax.devices()[0].device_kind)
        self.accounting = Accounting(
            start_step=step,
            before=cost_before(meta, source, task.cost),
            batch=task.cfg.train.batch,
            per_sample=task.cost,
            peak_flops=None if peak is None else peak * devices,
        )
        self._epochs_before = epochs_before(meta, source)
        self._left_out = meta.get("left_out", [])
        if meta and not meta.get("drawn_evaluations"):
            warn_of_other_evaluations(task, step)

    @property
    def start_step(self) -> int:
        """The step that this attempt starts from."""
        return self.accounting.start_step

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each part of the data was seen, those too that the run no longer reads."""
        counted = self.source.epoch(samples)
        names = {**self._epochs_before, **counted}
        return {name: self._epochs_before.get(name, 0.0) + counted.get(name, 0.0) for name in names}

    def warn_of_repeats(self, samples: int) -> None:
        """Say which part of the data a run of so many samples reads more often than is of any use."""
        for name, epochs in self.epochs(samples).items():
            if epochs > MOST_EPOCHS and group.is_leader():
                logger.warning(
                    "data source %s is read %.0f times in all, and after %d times the same text teaches nothing more "
                    "(arXiv:2305.16264): give it more text, or train fewer steps",
                    name,
                    epochs,
                    MOST_EPOCHS,
                )

    def meta(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` keeps, as JSON."""
        spent = self.accounting.spent(step)
        return {
            "data": self.source.state(spent.samples),
            **self.accounting.totals(step),
            "counts": spent._asdict(),
            "epochs": self.epochs(spent.samples),
            "epochs_before": self._epochs_before,
            "drawn_evaluations": True,
            **({"left_out": self._left_out} if self._left_out else {}),
            **self._base,
        }


def warn_of_other_evaluations(task: Task, step: int) -> None:
    """Say that `val/` jumps at a step, of a run whose batches of windows were the first ones up to there."""
    of_windows = task.cfg.train.evaluate_batches is not None and task.cfg.data.documents != "whole"
    if of_windows and group.is_leader():
        logger.warning(
            "val/ does not compare with what it was before step %d: its batches are drawn from the whole set now, and "
            "were its first ones",
            step,
        )


def cost_before(meta: Mapping[str, Any], source: Source, cost: Cost) -> Cost:
    if "counts" in meta:
        return Cost(**meta["counts"])
    # A new run, or an older checkpoint, whose samples count as those to come.
    before = Cost(0, 0, 0, 0, 0).plus(source.next_sample, cost)
    return before._replace(tokens=meta["tokens"], flops_causal=meta["flops"]) if meta else before


def epochs_before(meta: Mapping[str, Any], source: Source) -> dict[str, float]:
    """The epochs from before the data were changed, by name: the source does not count them."""
    if "epochs" not in meta or meta["data"]["fingerprint"] == source.fingerprint:
        return meta.get("epochs_before", {})
    counted = source.epoch(source.next_sample)
    return {name: epochs - counted.get(name, 0.0) for name, epochs in meta["epochs"].items()}
