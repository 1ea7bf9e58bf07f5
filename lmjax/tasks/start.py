"""Where weights come from at the start of a run: drawn anew, or read from another run or a Hugging Face checkpoint.

A setting names what they are read from, `train.init_from` or another, which messages then begin with.
"""

import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from lmjax import config as configs
from lmjax.data.tokenizers.load import load_tokenizer, saved_hash
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import ConfigError
from lmjax.hf import imported
from lmjax.hf.config_json import differences
from lmjax.hf.params import check_tensors, read_params
from lmjax.hf.tokenizer_files import kept_files, read_tokenizer
from lmjax.models.config import ModelConfig
from lmjax.record import checkpoint, files, seal
from lmjax.record.steps import origin_checkpoint, parse_origin
from lmjax.record.trees import leaves_by_path, shape_dtype
from lmjax.weights import Params, Spec, abstract, by_path, part

logger = logging.getLogger(__name__)
INIT_FROM = "train.init_from"


@dataclasses.dataclass(frozen=True)
class Start:
    """The first values of weights, float32, each laid out by its sharding.

    `start(key, scalars, shardings)` is called in the mesh. `shardings` is a tree like the weights, or a part of it, and
    then only those are made. `scalars` are the task's: numbers, or traced arrays where many runs start at once.
    """

    make: Callable[[jax.Array, Mapping[str, Any], Any], Params]
    check: Callable[[], None] = lambda: None
    """Raises ConfigError or CheckpointError for weights that are not there, or are not this model's: before a step."""
    digest: Callable[[], str | None] = lambda: None
    """Names the values by a hash of the files that hold them, wherever they lie, or by several, a+b; None for what is
    drawn, or is gone."""
    without: "Callable[[Collection[str]], Start] | None" = None
    """(paths) -> the same without the weights of these paths, which need not be there; None for what is drawn."""

    def __call__(self, key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        return self.make(key, scalars, shardings)


def drawn(initial: Callable[[jax.Array, Mapping[str, Any]], Params]) -> Start:
    """Weights as `initial(key, scalars)` makes them, in one program, each where it will live.

    It runs once: on CPU, LLVM's full optimization takes three times as long to compile and saves nothing.
    """

    def start(key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None

        def asked_for(key: jax.Array) -> Params:
            return part(initial(key, scalars), shardings)

        return jax.jit(asked_for, out_shardings=shardings, compiler_options=options)(key)

    return Start(start)


def read_from(
    origin: str, model: ModelConfig, spec: Spec, tokenizer_hash: str | None = None, *, setting: str = INIT_FROM
) -> Start:
    """The weights of what a setting names, another run or a Hugging Face directory; nothing else of it."""
    found = hugging_face(origin)

    def start(left_out: Collection[str]) -> Start:
        reads = {name for path, one in by_path(spec).items() if path not in left_out for name in one.names}
        known = tokenizer_hash if "vocab" in reads else None
        if found is not None:
            unread = {"vocab", "context"} - reads
            is_tied_or_not = {"tied"} if "vocab" in unread or "unembed" in left_out else set()
            return from_hugging_face(found, model, setting, known, unread | is_tied_or_not)
        return from_run(origin, spec, setting, known, left_out)

    return dataclasses.replace(start(()), without=start)


def model_of(origin: str, *, setting: str = INIT_FROM) -> ModelConfig:
    """The model of a run, or of a Hugging Face directory, that weights may be read from. Raises ConfigError without."""
    found = hugging_face(origin)
    if found is not None:
        return imported.read_model(found.path)[0]
    origin_checkpoint(setting, origin)
    return configs.from_json(parse_origin(setting, origin)[0] / "config.json").model


def digest(origin: str) -> str | None:
    """Names the weights that such a setting means by a hash of the files that hold them, wherever they lie; None where
    there are none."""
    found = hugging_face(origin)
    if found is not None:
        is_there = any(found.path.glob("*.safetensors"))
        return (found.digest or hash_weights(found.path)) if is_there else None
    try:
        manifest, problems = seal.read(origin_checkpoint(INIT_FROM, origin))
    except ConfigError:
        return None
    listed = json.dumps(manifest["files"], sort_keys=True) if not problems else None
    return None if listed is None else files.hash_bytes(listed.encode(), digest_size=16)


def directory_of(init_from: str) -> epath.Path:
    """The work directory, or the Hugging Face directory, that `train.init_from` names, without step or hash."""
    found = hugging_face(init_from)
    return parse_origin(INIT_FROM, init_from)[0] if found is None else epath.Path(found.path)


def tokenizer_of(init_from: str, model: ModelConfig) -> tuple[Tokenizer | None, dict[str, bytes]]:
    """The tokenizer of what it names, and the files that belong beside it, such as a chat template."""
    found = hugging_face(init_from)
    if found is not None:
        return read_tokenizer(found.path, model)
    saved = directory_of(init_from) / "tokenizer"
    return (load_tokenizer(saved), kept_files(saved)) if saved.exists() else (None, {})


# From a run -------------------------------------------------------------------------------------------------------


def from_run(origin: str, spec: Spec, setting: str, tokenizer_hash: str | None, left_out: Collection[str]) -> Start:
    """The weights of another run's newest checkpoint, or of `WORKDIR@STEP`, but for those that are `left_out`; nothing
    else of that run.

    Starting raises what `check_origin` does, and CheckpointError for a checkpoint that is damaged.
    """

    def start(key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        saved = check_origin(origin, spec, setting, tokenizer_hash, left_out)
        shapes = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            part(abstract(spec), shardings),
            shardings,
        )
        params, _, _ = checkpoint.restore_weights(saved, shapes, whole=False)
        print(f"{setting}: the weights of {saved}")
        return params

    def check() -> None:
        check_origin(origin, spec, setting, tokenizer_hash, left_out)

    return Start(start, check, functools.partial(digest, origin))


def check_origin(
    origin: str, spec: Spec, setting: str, tokenizer_hash: str | None, left_out: Collection[str]
) -> epath.Path:
    """The directory of the checkpoint that the weights come from.

    Raises ConfigError for a run that is not there, whose weights differ in a path or a shape, but for those that are
    `left_out`, or that was trained with another tokenizer than the one of this hash.
    """
    saved, (workdir, _) = origin_checkpoint(setting, origin), parse_origin(setting, origin)
    manifest = seal.read(saved)[0]
    part = checkpoint.weights_part(manifest)
    leaves = {path: leaf for path, leaf in manifest.get("leaves", {}).items() if path.startswith(f"{part}/")}
    wanted = {path: shape_dtype(leaf) for path, leaf in leaves_by_path({part: abstract(spec)}).items()}
    unread = {f"{part}/{path}" for path in left_out}
    compared = [path for path in {**leaves, **wanted} if path not in unread]
    if leaves and any(leaves.get(path) != wanted.get(path) for path in compared):
        path = next(path for path in compared if leaves.get(path) != wanted.get(path))
        was, wants = (str(tuple(found[path][0])) if path in found else "absent" for found in (leaves, wanted))
        raise ConfigError(
            f"{setting}={origin} has other weights than this model: {path.removeprefix(f'{part}/')} is {was} "
            f"there, {wants} here; give the model the same sizes, or name in tune.fresh what is to be drawn anew"
        )
    if tokenizer_hash is not None and not (workdir / "tokenizer").exists():
        logger.warning("%s=%s has no tokenizer; it is taken to be that of the data", setting, origin)
    elif tokenizer_hash is not None and saved_hash(workdir / "tokenizer") != tokenizer_hash:
        raise ConfigError(
            f"{setting}={origin} was trained with another tokenizer than the data's; prepare them with "
            f"--tokenizer-file={workdir / 'tokenizer'}, or draw its tables anew: tune.fresh"
        )
    return saved


def pinned(origin: str, *, setting: str = INIT_FROM) -> str:
    """`WORKDIR@STEP`, with the newest step where none is given: a restart must start from the same weights. For a
    Hugging Face directory, `DIR@HASH`."""
    found = hugging_face(origin)
    if found is not None:
        return f"{found.path}@{found.digest or hash_weights(found.path)}"
    workdir, step = parse_origin(setting, origin)
    return f"{workdir}@{origin_checkpoint(setting, origin).name if step is None else step}"


# From a Hugging Face directory ------------------------------------------------------------------------------------


class HuggingFace(NamedTuple):
    """A directory of a Hugging Face checkpoint."""

    path: Path
    digest: str | None
    """The hash of the weights that are meant."""


def hugging_face(origin: str) -> HuggingFace | None:
    """`DIR` that has files of weights and is no run, or `DIR@HASH`; None for what is neither."""
    if (known := re.fullmatch(r"(.+)@([0-9a-f]{32})", origin)) is not None:
        return HuggingFace(Path(known[1]), known[2])
    directory = Path(os.fspath(files.locate(origin))) if origin and "://" not in origin else None
    if directory is None or (directory / "checkpoints").exists() or not any(directory.glob("*.safetensors")):
        return None
    return HuggingFace(directory, None)


def from_hugging_face(
    origin: HuggingFace,
    model: ModelConfig,
    setting: str,
    tokenizer_hash: str | None,
    may_differ: Collection[str],
) -> Start:
    """The weights of a Hugging Face checkpoint, of a model that differs at most in these settings.

    Starting raises ConfigError for one that is of another model, has other weights than those of the hash, or is of
    another tokenizer, and CheckpointError for tensors that are not those of its config.json.
    """
    directory = origin.path

    def check() -> None:
        if origin.digest not in (None, hash_weights(directory)):
            raise ConfigError(f"{setting}={directory} no longer holds the weights that this run began with")
        theirs, family = imported.read_model(directory)
        lost = differences(model, theirs)
        if model.position != "learned":  # how long sequences may be is then no matter of the weights
            lost.pop("context", None)
        for name, (here, there) in lost.items():
            if name in may_differ:
                continue
            raise ConfigError(f"{setting}={directory}: model.{name} is {there!r} there, {here!r} here; set what it has")
        check_tensors(directory, family, theirs)
        _check_its_tokenizer(directory, theirs, setting, tokenizer_hash)

    def start(key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        check()
        theirs, family = imported.read_model(directory)
        params = read_params(directory, family, theirs, shardings)
        print(f"{setting}: the weights of {directory}")
        return params

    return Start(start, check, lambda: origin.digest or hash_weights(directory))


def hash_weights(directory: Path) -> str:
    """A hash of a directory's files of weights, by name."""
    found = {path.name: files.hash_file(epath.Path(path)) for path in sorted(directory.glob("*.safetensors"))}
    return files.hash_bytes(json.dumps(found).encode(), digest_size=16)


def _check_its_tokenizer(directory: Path, model: ModelConfig, setting: str, tokenizer_hash: str | None) -> None:
    if tokenizer_hash is None:
        return
    tokenizer, _ = read_tokenizer(directory, model)
    if tokenizer is None:
        logger.warning("%s=%s has no tokenizer; it is taken to be that of the data", setting, directory)
    elif tokenizer.hash != tokenizer_hash:
        raise ConfigError(
            f"{setting}={directory} was trained with another tokenizer than the data's; prepare them with "
            f"--tokenizer-file={directory}/tokenizer.json --endoftext='{tokenizer.endoftext}'"
        )
