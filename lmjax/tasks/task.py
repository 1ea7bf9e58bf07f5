"""The seam between what is trained and the run that trains it.

`run/` trains a task by what stands here alone; to make one it asks lmjax/registry.py. A wrapper, such as low-rank
adapters, is a function from a Task to a Task; another kind of training is another function from a config to a Task, and
a line in lmjax/registry.py.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from etils import epath

from lmjax.config import Config
from lmjax.errors import CheckpointError
from lmjax.models.model import Model
from lmjax.tasks.start import Start
from lmjax.train.accounting import Cost
from lmjax.train.objective import Objective
from lmjax.weights import Params, Spec, merge


class Source(Protocol):
    """Training samples by their global index: sample n is a pure function of (`fingerprint`, n)."""

    fingerprint: str
    """Names everything that fixes the order of samples."""
    next_sample: int

    def __iter__(self) -> Iterator[Any]:
        """Batches from `next_sample` on, forever: those rows of each that this process feeds, on the host."""

    def state(self, next_sample: int) -> Mapping[str, Any]:
        """What a checkpoint keeps, as JSON, so that a source goes on with sample `next_sample`."""

    def epoch(self, next_sample: int) -> Mapping[str, float]:
        """How often each part of the data was seen, by name, when the samples before `next_sample` are done."""

    def recorded(self, batch: Any) -> np.ndarray:
        """The array that the ledger keeps checksums of, one for each row of the batch."""


class MakeSource(Protocol):
    def __call__(self, *, rows: np.ndarray, at: Mapping[str, Any] | int, allow_data_change: bool = False) -> Source:
        """The source of batches whose `rows` this process feeds, from a sample index or a saved state on."""


class Evaluate(Protocol):
    def __call__(
        self,
        params: Params,
        frozen: Params,
        *,
        step: int,
        mesh: jax.sharding.Mesh | None,
        last: bool,
        on_batch: Callable[[str], None],
    ) -> Mapping[str, Any]:
        """Metrics by their full names: none where none are due at this step, more of them at the `last` one. The mean
        of all `val/NAME/loss` tells which checkpoint is best. All processes call it together. `on_batch(what)` is
        called as each batch begins, and may raise to leave off."""


class Frozen(NamedTuple):
    """Weights that the loss reads and nothing changes: sharded by their own spec, never donated, never saved.

    A checkpoint of what stands on them names them by `start.digest()`, and is read with some of them, too.
    """

    spec: Spec
    start: Start
    hold: Callable[[Params], Params] = lambda weights: weights
    """Weights as `start` makes them -> as they are held, in fewer bytes perhaps: a pure function of arrays."""

    def weights(self, key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        """The weights as they are held. Raises what `start` does."""
        held: Params = jax.jit(self.hold)(self.start(key, scalars, shardings))
        return held

    def check_same(self, meta: Mapping[str, Any], where: str) -> None:
        """Raise CheckpointError unless the checkpoint with this meta, at `where`, stands on these weights."""
        known, here = meta.get("base"), self.start.digest()
        if not {*(here or "").split("+")} <= {"", *(known or "").split("+")}:
            raise CheckpointError(
                f"{where} stands on the weights with the hash {known}, and those that are named now have {here}; give "
                "it those that it was trained on"
            )


class Language(NamedTuple):
    """What was trained, as a language model: what generating, evaluating and converting read of a work directory."""

    model: Model
    scorer: Model
    """The same computing in float32: what every reported number is measured with."""
    weights: Callable[[Params, Params], Params] = merge
    """(frozen, params) -> the weights of both; one may be what `models/read.py: as_array` takes for an array."""
    frozen: Frozen | None = None
    """What of the task's frozen weights the model is not whole without."""


class Task(NamedTuple):
    """What a run trains."""

    cfg: Config
    """The config with everything filled in that the data decide: what config.json says."""
    spec: Spec
    """The weights that are trained: optimizer, shardings and checkpoints follow from it."""
    start: Start
    objective: Objective
    batch: Any
    """Shapes and dtypes of one global batch of the source: a dataclass as in devices/rows.py, with `ids_B`."""
    cost: Cost
    """What one sample costs."""
    frozen: Frozen | None = None
    language: Language | None = None
    """What was trained, as a language model; None where that is something else."""
    source: MakeSource | None = None
    evaluations: Mapping[str, Evaluate] = MappingProxyType({})
    sample: Callable[[Params, Params], str] | None = None
    """(params, frozen), on one device -> a text to look at."""
    baselines: Callable[[], Mapping[str, float]] = dict
    """Numbers that do not depend on training, for the summary."""
    write_files: Callable[[epath.Path], None] = lambda workdir: None
    """What the work directory needs so that others can use what was trained, such as the tokenizer."""
    about: Mapping[str, Any] = MappingProxyType({})
    """What an attempt says of its data when it starts, as JSON."""
