"""Where weights come from at the start of a run: drawn anew, or read from another run."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from etils import epath

from lmjax.data.tokenizers.load import saved_hash
from lmjax.errors import ConfigError
from lmjax.record import checkpoint, seal
from lmjax.record.steps import origin_checkpoint, parse_origin
from lmjax.record.trees import leaves_by_path, shape_dtype
from lmjax.weights import Params, Spec, abstract

logger = logging.getLogger(__name__)
_SETTING = "train.init_from"


class Start(Protocol):
    def __call__(self, key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        """Every weight's first value, float32, laid out by a tree of shardings. Called in the mesh.

        `scalars` are the task's: numbers, or traced arrays where many runs start at once.
        """


def drawn(initial: Callable[[jax.Array, Mapping[str, Any]], Params]) -> Start:
    """Weights as `initial(key, scalars)` makes them, in one program, each where it will live.

    It runs once: on CPU, LLVM's full optimization takes three times as long to compile and saves nothing.
    """

    def start(key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
        draw = jax.jit(lambda key: initial(key, scalars), out_shardings=shardings, compiler_options=options)
        return draw(key)

    return start


def from_run(init_from: str, spec: Spec, tokenizer_hash: str | None = None) -> Start:
    """The weights of another run's newest checkpoint, or of `WORKDIR@STEP`; nothing else of that run.

    Starting raises what `check_origin` does, and CheckpointError for a checkpoint that is damaged.
    """

    def start(key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        saved = check_origin(init_from, spec, tokenizer_hash)
        shapes = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract(spec), shardings
        )
        params, _ = checkpoint.restore_weights(saved, shapes)
        print(f"starting from the weights of {saved}")
        return params

    return start


def check_origin(init_from: str, spec: Spec, tokenizer_hash: str | None = None) -> epath.Path:
    """The directory of the checkpoint that the weights come from.

    Raises ConfigError for a run that is not there, whose weights differ in a path or a shape, or that was trained with
    another tokenizer than the one of this hash.
    """
    saved, (workdir, _) = origin_checkpoint(_SETTING, init_from), parse_origin(_SETTING, init_from)
    manifest = seal.read(saved)[0]
    part = checkpoint.weights_part(manifest)
    leaves = {path: leaf for path, leaf in manifest.get("leaves", {}).items() if path.startswith(f"{part}/")}
    wanted = {path: shape_dtype(leaf) for path, leaf in leaves_by_path({part: abstract(spec)}).items()}
    if leaves and leaves != wanted:
        path = next(path for path in {**leaves, **wanted} if leaves.get(path) != wanted.get(path))
        was, wants = (str(tuple(found[path][0])) if path in found else "absent" for found in (leaves, wanted))
        raise ConfigError(
            f"train.init_from={init_from} has other weights than this model: {path.removeprefix(f'{part}/')} is {was} "
            f"there, {wants} here; give the model the same sizes"
        )
    if tokenizer_hash is not None and not (workdir / "tokenizer").exists():
        logger.warning("train.init_from=%s has no tokenizer; it is taken to be that of the data", init_from)
    elif tokenizer_hash is not None and saved_hash(workdir / "tokenizer") != tokenizer_hash:
        raise ConfigError(
            f"train.init_from={init_from} was trained with another tokenizer than the data's; prepare them with "
            f"--tokenizer-file={workdir / 'tokenizer'}"
        )
    return saved


def pinned(init_from: str) -> str:
    """`WORKDIR@STEP`, with the newest step where none is given: a restart must start from the same weights."""
    workdir, step = parse_origin(_SETTING, init_from)
    return f"{workdir}@{origin_checkpoint(_SETTING, init_from).name if step is None else step}"
