"""From a config to the parts of a run."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.config import Config
from lmjax.data.batch import Batch
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.data.windows import as_batch
from lmjax.devices import mesh as meshes
from lmjax.devices import rows
from lmjax.devices.mesh import check_divides
from lmjax.devices.place import use_mesh
from lmjax.errors import ConfigError
from lmjax.models import decoder
from lmjax.models.config import dominant, require_learning
from lmjax.models.model import Model
from lmjax.optim.config import hyper
from lmjax.optim.optimizers import Optimizer, build, state_shardings
from lmjax.process import group
from lmjax.train.objective import Objective, language_model
from lmjax.train.state import TrainState, zero_counters
from lmjax.train.step import Step, make_step
from lmjax.weights import Params, count, initialize

_MOST_PARAMETERS = 1 << 44  # 16 bytes of state for each are 256 TiB


class Experiment(NamedTuple):
    """A config with its vocabulary filled in, and what follows from it."""

    cfg: Config
    model: Model
    objective: Objective
    optimizer: Optimizer
    mesh: jax.sharding.Mesh | None
    """None on a single device: then nothing is sharded and nothing needs to know."""


def assemble(cfg: Config, devices: list[Any] | None = None) -> Experiment:
    """The parts of a run, on every device or on `devices`. Raises ConfigError for parts that do not fit together."""
    require_learning(cfg.model)
    model = decoder.build(cfg.model, microbatches=cfg.train.microbatches)
    if (parameters := count(model.spec).total) > _MOST_PARAMETERS:
        raise ConfigError(f"the model would have {parameters:,} parameters, more than can be held; make it smaller")
    return Experiment(
        cfg=cfg,
        model=model,
        objective=language_model(model, cfg.train.loss),
        optimizer=build(cfg.optimizer, model.spec),
        mesh=make_mesh(cfg, devices),
    )


def with_vocab(cfg: Config, tokenizer: Tokenizer) -> Config:
    """The config with model.vocab filled in. Raises ConfigError when the model has too few rows for the tokens."""
    if cfg.model.vocab is not None and cfg.model.vocab < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab={cfg.model.vocab} is smaller than the tokenizer's {tokenizer.vocab_size}; leave it unset"
        )
    vocab = cfg.model.vocab or tokenizer.vocab_size
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab=vocab))


def make_mesh(cfg: Config, devices: list[Any] | None = None) -> jax.sharding.Mesh | None:
    """The mesh, or None for the one device there is. Raises ConfigError when it does not divide the batches.

    `devices` may be of a machine that is not here: a mesh is then the only thing that names them, even if it is one.
    """
    mesh = meshes.make_mesh(cfg.mesh, devices)
    if group.processes() > 1 and mesh.size != jax.device_count():
        raise ConfigError(
            f"the mesh takes {mesh.size} of {jax.device_count()} devices in {group.processes()} processes: none "
            "may be left out; leave one mesh axis unset, or start fewer processes"
        )
    if mesh.size == 1 and devices is None:
        return None
    check_stages(mesh, cfg)
    pieces = cfg.train.batch // cfg.train.microbatches
    check_divides("microbatch", pieces, mesh, setting="train.batch / train.microbatches")
    rows.check_batch(mesh, rows=cfg.train.batch, setting="train.batch", T=cfg.data.seq_len)
    if cfg.train.evaluate_batch is not None:
        rows.check_batch(mesh, rows=cfg.train.evaluate_batch, setting="train.evaluate_batch", T=cfg.data.seq_len)
    return mesh


def check_stages(mesh: jax.sharding.Mesh, cfg: Config) -> None:
    """Raise ConfigError unless the pipeline's stages divide the layers that they share, and the microbatches."""
    period, repeats = cfg.model.segments[dominant(cfg.model.segments)]
    layers = cfg.model.layers
    what = "model.layers" if repeats == layers else f"the periods of {len(period)} layers in model.layers={layers}"
    check_divides("layers", repeats, mesh, setting=what)
    check_divides("layers", cfg.train.microbatches, mesh, setting="train.microbatches")


def jitted_step(experiment: Experiment) -> Any:
    """The train step, its state donated, its outputs pinned to the shardings of its inputs; call it in the mesh."""
    return jax.jit(
        make_step(experiment.objective, experiment.optimizer, microbatches=experiment.cfg.train.microbatches),
        donate_argnums=0,
        out_shardings=(shardings(experiment), None),
    )


def compiled_step(experiment: Experiment) -> Step:
    """The train step, compiled when it is first called."""
    step = jitted_step(experiment)

    def in_mesh(*arguments: Any) -> Any:
        with use_mesh(experiment.mesh):
            return group.in_turn(step(*arguments))

    return in_mesh


def abstract_batch(experiment: Experiment) -> Batch:
    """Shapes, dtypes and shardings of a batch: what the step is compiled for."""
    cfg, mesh = experiment.cfg, experiment.mesh
    rows_BS = np.zeros((cfg.train.batch, cfg.data.seq_len + 1), np.int32)
    batch = as_batch(rows_BS, rows_BS, np.arange(cfg.train.batch), cfg.data.documents)

    def placed(x: np.ndarray) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else rows.batch_sharding(mesh, x.ndim)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(placed, batch)


def initial_state(experiment: Experiment) -> TrainState:
    """A run's state before its first step, made where it will live."""

    def make() -> TrainState:
        return _state(experiment, initialize(experiment.model.spec, jax.random.key(experiment.cfg.train.seed)))

    with use_mesh(experiment.mesh):
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


def device_bytes(tree: Any) -> int:
    """What the arrays of a tree, abstract ones too, take up on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def shardings(experiment: Experiment) -> Any:
    """A TrainState of shardings; step outputs are pinned to them, so that the step compiles once."""
    mesh = experiment.mesh
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(lambda: _state(experiment, initialize(experiment.model.spec, jax.random.key(0))))
        return jax.tree.map(lambda _: single, shapes)
    replicated = meshes.replicated(mesh)
    scalars = hyper(experiment.cfg.optimizer, steps=experiment.cfg.train.steps)
    return TrainState(
        params=meshes.shardings(experiment.model.spec, mesh),
        opt_state=state_shardings(experiment.optimizer, experiment.model.spec, mesh),
        hyper=jax.tree.map(lambda _: replicated, scalars),
        buffers={},
        counters=jax.tree.map(lambda _: replicated, zero_counters()),
    )
