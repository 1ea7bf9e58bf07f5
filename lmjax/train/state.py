"""The arrays of a run that a checkpoint holds. The scalars in `hyper` are saved to be looked at; a run that goes on
reads them from its config."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lmjax.train.spikes import Recent
from lmjax.weights import Params


@flax.struct.dataclass
class Counters:
    """int32 scalars."""

    step: jax.Array
    """Updates done, skipped ones included."""
    skipped: jax.Array
    """Updates left out because the loss or the gradient was not finite, or a spike."""
    skipped_in_a_row: jax.Array


def zero_counters() -> Counters:
    return Counters(*(jnp.zeros((), jnp.int32) for _ in range(3)))


@flax.struct.dataclass
class TrainState:
    params: Params
    opt_state: Any
    hyper: dict[str, jax.Array]
    """Scalar hyperparameters as arrays: runs that differ only here share one compiled step."""
    counters: Counters
    average: Params | None = None
    """Of the weights, where the run keeps one; laid out as they are."""
    recent: Recent | None = None
    """What steps are judged by, where spikes are left out."""

    @property
    def delivered(self) -> Params:
        """The weights that are evaluated, generated from and exported."""
        return self.params if self.average is None else self.average
