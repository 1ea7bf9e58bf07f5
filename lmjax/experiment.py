"""From a config to the parts of a run: data, model, optimizer, mesh, state."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lmjax import checkpoint, layout
from lmjax.config import Config, from_json
from lmjax.data.batch import Batch
from lmjax.data.prepare import prepare
from lmjax.data.shards import Dataset, is_prepared, open_dataset
from lmjax.data.tokenizer import Tokenizer
from lmjax.errors import ConfigError, DataError
from lmjax.models import decoder
from lmjax.models.model import Model
from lmjax.optim.config import hyper
from lmjax.optim.optimizers import Optimizer, build, state_shardings
from lmjax.train.objective import Objective, language_model
from lmjax.train.state import TrainState, zero_counters
from lmjax.weights import Params, abstract, initialize


class Experiment(NamedTuple):
    cfg: Config
    """With the vocabulary filled in."""
    datasets: dict[str, Dataset]
    tokenizer: Tokenizer
    model: Model
    objective: Objective
    optimizer: Optimizer
    mesh: jax.sharding.Mesh | None
    """None on a single device: then nothing is sharded and nothing needs to know."""


def assemble(cfg: Config, *, progress: bool = True) -> Experiment:
    """All parts of a run. Prepares the data sources that have a recipe and no data yet."""
    datasets = open_sources(cfg, progress=progress)
    tokenizer = common_tokenizer(datasets)
    cfg = with_vocab(cfg, tokenizer)
    model = decoder.build(cfg.model)
    return Experiment(
        cfg=cfg,
        datasets=datasets,
        tokenizer=tokenizer,
        model=model,
        objective=language_model(model, cfg.train.loss),
        optimizer=build(cfg.optimizer, model.spec),
        mesh=make_mesh(cfg),
    )


# Data -------------------------------------------------------------------------------------------------------------


def open_sources(cfg: Config, *, progress: bool) -> dict[str, Dataset]:
    if not cfg.data.sources:
        raise ConfigError("data.sources is empty; name a prepared data set, e.g. --config=configs/quickstart.py")
    for name, source in cfg.data.sources.items():
        if source.prepare is not None:
            prepare(source.prepare, source.path, progress=progress)
        elif not is_prepared(source.path):
            raise DataError(
                f"data.sources.{name}.path={source.path} holds no prepared data; run `lmjax prepare` or give it a recipe"
            )
    return {name: open_dataset(source.path) for name, source in cfg.data.sources.items()}


def common_tokenizer(datasets: dict[str, Dataset]) -> Tokenizer:
    """The one tokenizer of all sources. Raises DataError when they differ."""
    (first, dataset), *others = datasets.items()
    tokenizer = dataset.tokenizer()
    for name, other in others:
        if other.tokenizer().hash != tokenizer.hash:
            raise DataError(f"data sources '{first}' and '{name}' were prepared with different tokenizers")
    return tokenizer


def with_vocab(cfg: Config, tokenizer: Tokenizer) -> Config:
    """The config with model.vocab filled in. Raises ConfigError when the model has too few rows for the tokens."""
    if cfg.model.vocab is not None and cfg.model.vocab < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab={cfg.model.vocab} is smaller than the tokenizer's {tokenizer.vocab_size}; leave it unset"
        )
    vocab = cfg.model.vocab or tokenizer.vocab_size
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab=vocab))


# Devices ----------------------------------------------------------------------------------------------------------


def make_mesh(cfg: Config) -> jax.sharding.Mesh | None:
    """The mesh, or None for a single device. Raises ConfigError when the batch does not divide over it."""
    mesh = layout.make_mesh(cfg.mesh)
    if mesh.size == 1:
        return None
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    for key, size in (("train.batch / train.microbatches", cfg.train.batch // cfg.train.microbatches),):
        if size % rows:
            raise ConfigError(f"{key}={size} is not divisible by mesh.data x mesh.fsdp={rows}; use {rows} or a multiple")
    return mesh


def entered(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def placer(mesh: jax.sharding.Mesh | None) -> Callable[[Batch], Batch]:
    """Puts a host batch on the devices, its rows spread over the mesh."""
    sharding = jax.devices()[0] if mesh is None else layout.batch_sharding(mesh)
    return functools.partial(jax.device_put, device=sharding)


# State ------------------------------------------------------------------------------------------------------------


def initial_state(experiment: Experiment) -> TrainState:
    """A run's state before its first step, made where it will live."""

    def make() -> TrainState:
        return _state(experiment, initialize(experiment.model.spec, jax.random.key(experiment.cfg.train.seed)))

    with entered(experiment.mesh):
        return jax.jit(make, out_shardings=shardings(experiment))()


def _state(experiment: Experiment, params: Params) -> TrainState:
    train = experiment.cfg.train
    scalars = hyper(experiment.cfg.optimizer, steps=train.steps, seed=train.seed)
    return TrainState(params, experiment.optimizer.init(params), scalars, {}, zero_counters())


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda: _state(experiment, initialize(experiment.model.spec, jax.random.key(0))))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings(experiment)
    )


def shardings(experiment: Experiment) -> Any:
    """A TrainState of shardings; step outputs are pinned to them, so that the step compiles once."""
    mesh = experiment.mesh
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(lambda: _state(experiment, initialize(experiment.model.spec, jax.random.key(0))))
        return jax.tree.map(lambda _: single, shapes)
    replicated = layout.replicated(mesh)
    scalars = hyper(experiment.cfg.optimizer, steps=experiment.cfg.train.steps)
    return TrainState(
        params=layout.shardings(experiment.model.spec, mesh),
        opt_state=state_shardings(experiment.optimizer, experiment.model.spec, mesh),
        hyper=jax.tree.map(lambda _: replicated, scalars),
        buffers={},
        counters=jax.tree.map(lambda _: replicated, zero_counters()),
    )


# A trained model --------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What evaluating and generating need of a work directory."""

    cfg: Config
    model: Model
    params: Params
    tokenizer: Tokenizer
    step: int


def load_trained(workdir: epath.PathLike, step: int | None = None, *, dtype: str | None = None) -> Trained:
    """The model of a work directory with the parameters of a checkpoint (default: the newest), on one device."""
    workdir = epath.Path(workdir)
    cfg = from_json(workdir / "config.json")
    tokenizer = load_tokenizer(workdir)
    cfg = with_vocab(cfg, tokenizer)
    model_cfg = dataclasses.replace(cfg.model, dtype=dtype or cfg.model.dtype)
    model = decoder.build(model_cfg)
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=single), abstract(model.spec))
    parts, _, found = checkpoint.restore_parts(workdir, {"params": shapes}, step=step)
    return Trained(cfg, model, parts["params"], tokenizer, found)
