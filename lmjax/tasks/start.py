"""Where weights come from at the start of a run: drawn anew, or read from another run."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from etils import epath

from lmjax.errors import ConfigError
from lmjax.record import checkpoint
from lmjax.weights import Params, Spec, abstract


class Start(Protocol):
    def __call__(self, key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        """Every weight's first value, float32, laid out by a tree of shardings. Called in the mesh.

        `scalars` are the task's: numbers, or traced arrays where many runs start at once.
        """


def drawn(initial: Callable[[jax.Array, Mapping[str, Any]], Params]) -> Start:
    """Weights as `initial(key, scalars)` makes them, in one program, each where it will live."""

    def start(key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        return jax.jit(lambda key: initial(key, scalars), out_shardings=shardings)(key)

    return start


def from_run(workdir: str, spec: Spec) -> Start:
    """The weights of another run's newest checkpoint, or of `WORKDIR@STEP`; nothing else of that run.

    Starting raises CheckpointError for a checkpoint that is damaged, or whose weights differ in a path or a shape.
    """
    directory, _, step = workdir.partition("@")
    if step and not step.isdigit():
        raise ConfigError(f"train.init_from={workdir}: the step after @ is a whole number, as in runs/base@2000")

    def start(key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        shapes = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract(spec), shardings
        )
        path = epath.Path(directory)
        parts, _, found = checkpoint.restore_parts(path, {"params": shapes}, step=int(step) if step else None)
        print(f"starting from the weights of {directory} at step {found}")
        return parts["params"]

    return start
