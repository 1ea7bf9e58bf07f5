"""From a task to what the loop needs: optimizer, mesh, compiled step, state."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lmjax.config import Config
from lmjax.devices import mesh as meshes
from lmjax.devices import rows
from lmjax.devices.mesh import check_divides
from lmjax.devices.place import use_mesh
from lmjax.errors import ConfigError
from lmjax.metrics import Metrics
from lmjax.models import float8
from lmjax.models.config import dominant, require_learning
from lmjax.optim import optimizers
from lmjax.optim.config import hyper
from lmjax.optim.optimizers import Optimizer, state_shardings
from lmjax.optim.schedules import Hyper
from lmjax.parametrization import check_scaled
from lmjax.process import group, start_up
from lmjax.tasks.task import Task
from lmjax.train.objective import scalar_arrays
from lmjax.train.spikes import Recent, none_yet
from lmjax.train.state import TrainState, zero_counters
from lmjax.train.step import StackedStep, Step, make_step, stacked
from lmjax.weights import Params, abstract, count

_MOST_PARAMETERS = 1 << 44  # 16 bytes of state for each are 256 TiB


class Experiment(NamedTuple):
    """A task, and what trains it."""

    task: Task
    optimizer: Optimizer
    mesh: jax.sharding.Mesh | None
    """None on a single device: then nothing is sharded and nothing needs to know."""

    @property
    def cfg(self) -> Config:
        return self.task.cfg


def assemble(task: Task, devices: list[Any] | None = None) -> Experiment:
    """What trains a task, on every device or on `devices`. Raises ConfigError for parts that do not fit together."""
    require_learning(task.cfg.model)
    float8.check(task.cfg.model)
    check_scaled(task.cfg.model.parametrization, task.spec)
    if (parameters := count(task.spec).total) > _MOST_PARAMETERS:
        raise ConfigError(f"the model would have {parameters:,} parameters, more than can be held; make it smaller")
    return Experiment(task, optimizers.build(task.cfg.optimizer, task.spec), make_mesh(task.cfg, devices))


# Devices ----------------------------------------------------------------------------------------------------------


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
    check_fits(mesh, cfg)
    return mesh


def check_fits(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, cfg: Config) -> None:
    """Raise ConfigError unless the mesh divides the batches and the layers."""
    check_stages(mesh, cfg)
    pieces = cfg.train.batch // cfg.train.microbatches
    check_divides("microbatch", pieces, mesh, setting="train.batch / train.microbatches")
    rows.check_batch(mesh, rows=cfg.train.batch, setting="train.batch", T=cfg.data.seq_len)
    if cfg.train.evaluate_batch is not None:
        rows.check_batch(mesh, rows=cfg.train.evaluate_batch, setting="train.evaluate_batch", T=cfg.data.seq_len)


def check_stages(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, cfg: Config) -> None:
    """Raise ConfigError unless the pipeline's stages divide the layers that they share, and the microbatches."""
    period, repeats = cfg.model.segments[dominant(cfg.model.segments)]
    layers = cfg.model.layers
    what = "model.layers" if repeats == layers else f"the periods of {len(period)} layers in model.layers={layers}"
    check_divides("layers", repeats, mesh, setting=what)
    check_divides("layers", cfg.train.microbatches, mesh, setting="train.microbatches")
    if cfg.train.noise_scale and mesh.shape["pipeline"] > 1:
        raise ConfigError("train.noise_scale: the stages of a pipeline do not tell microbatches apart; leave it off")


def plain_step(experiment: Experiment) -> Step:
    """The train step, not compiled."""
    train = experiment.cfg.train
    return make_step(
        experiment.task.objective,
        experiment.optimizer,
        microbatches=train.microbatches,
        noise_scale=train.noise_scale,
        skip_spikes=train.skip_spikes,
    )


def jitted_step(experiment: Experiment) -> Any:
    """The train step, its state donated, its outputs pinned to the shardings of its inputs; call it in the mesh."""
    return jax.jit(
        plain_step(experiment),
        donate_argnums=0,
        out_shardings=(shardings(experiment), None),
        compiler_options=_compiler_options(experiment.mesh),
    )


def _compiler_options(mesh: jax.sharding.Mesh | None) -> dict[str, bool] | None:
    """Of a step for the devices of the mesh, or for the one there is. By the first one XLA's CPU backend finds that
    moments can be updated where they are, where it would first copy them all. By the second its threads do not take
    turns on a single core, which empties the core's cache between the parts of a product."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform != "cpu":
        return None
    several = start_up.cpu_cores() > 1
    return {"xla_cpu_copy_insertion_use_region_analysis": True, "xla_cpu_multi_thread_eigen": several}


def compiled_step(experiment: Experiment) -> Step:
    """The train step, compiled when it is first called."""
    step = jitted_step(experiment)

    def in_mesh(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        with use_mesh(experiment.mesh):
            return group.run(step, state, frozen, batch)

    return in_mesh


def stacked_step(experiment: Experiment) -> StackedStep:
    """The train step of many runs as one, on one device, compiled anew for each number of them; the experiment is any
    of theirs."""
    step = stacked(plain_step(experiment))
    return jax.jit(step, donate_argnums=0, compiler_options=_compiler_options(experiment.mesh))


def abstract_batch(experiment: Experiment) -> Any:
    """Shapes, dtypes and shardings of a batch: what the step is compiled for."""

    def placed(names: str, x: Any) -> jax.ShapeDtypeStruct:
        sharding = None if experiment.mesh is None else rows.row_sharding(experiment.mesh, names)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return rows.map_arrays(placed, experiment.task.batch)


def attends(experiment: Experiment) -> str:
    """By what the step attends, and why by nothing faster; empty for what has no attention that we know."""
    language, cfg = experiment.task.language, experiment.cfg
    if language is None or language.model.attends is None:
        return ""
    frozen = {} if language.frozen is None else abstract_frozen(experiment)
    with use_mesh(experiment.mesh):
        whole = jax.eval_shape(language.weights, frozen, abstract_state(experiment).params)
        return language.model.attends(whole, cfg.data.seq_len, apart=cfg.data.documents != "joined")


# State ------------------------------------------------------------------------------------------------------------


def initial_state(experiment: Experiment) -> TrainState:
    """A run's state before its first step, made where it will live. Raises what the task's `start` does."""
    task, laid_out = experiment.task, shardings(experiment)
    with use_mesh(experiment.mesh):
        params = task.start(jax.random.key(task.cfg.train.seed), task.objective.scalars, laid_out.params)
        opt_state = jax.jit(experiment.optimizer.init, out_shardings=laid_out.opt_state)(params)
        counters = jax.device_put(zero_counters(), laid_out.counters)
        average = jax.tree.map(jnp.copy, params) if keeps_average(experiment) else None
        recent = jax.device_put(recent_steps(experiment), laid_out.recent)
        return TrainState(params, opt_state, placed_scalars(experiment), counters, average, recent)


def recent_steps(experiment: Experiment) -> Recent | None:
    """What steps are judged by, before there are any; None where spikes are not left out."""
    return None if experiment.cfg.train.skip_spikes is None else none_yet()


def keeps_average(experiment: Experiment) -> bool:
    return experiment.cfg.train.average_decay > 0


def frozen_params(experiment: Experiment) -> Params:
    """The weights that the loss reads and nothing changes."""
    task, mesh = experiment.task, experiment.mesh
    if task.frozen is None:
        return {}
    laid_out = spec_shardings(task.frozen.spec, mesh)
    with use_mesh(mesh):
        key = jax.random.key(task.cfg.train.seed)
        return task.frozen.weights(key, task.objective.scalars, laid_out)


def abstract_frozen(experiment: Experiment) -> Params:
    """Shapes, dtypes and shardings of these."""
    frozen, mesh = experiment.task.frozen, experiment.mesh
    if frozen is None:
        return {}
    shapes = abstract_sharded(abstract(frozen.spec), spec_shardings(frozen.spec, mesh))
    with use_mesh(mesh):
        held = jax.eval_shape(frozen.hold, shapes)
    if mesh is None:
        return abstract_sharded(held, jax.tree.map(lambda _: own_device_sharding(), held))
    return abstract_sharded(held, jax.tree.map(lambda x: NamedSharding(mesh, x.sharding.spec), held))


def abstract_sharded(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes and dtypes with a tree of shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )


def all_scalars(experiment: Experiment) -> Hyper:
    """The optimizer's scalar hyperparameters and the task's, as the step reads them."""
    train = experiment.cfg.train
    own = hyper(experiment.cfg.optimizer, steps=train.steps, seed=train.seed)
    scalars = scalar_arrays(experiment.task.objective.scalars)
    if keeps_average(experiment):
        scalars |= scalar_arrays({"average_decay": train.average_decay})
    assert not own.keys() & scalars.keys(), sorted(own.keys() & scalars.keys())
    return {**own, **scalars}


def placed_scalars(experiment: Experiment) -> Hyper:
    """`all_scalars` where the step reads them."""
    return jax.device_put(all_scalars(experiment), shardings(experiment).hyper)


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
    return abstract_sharded(state_shapes(experiment), shardings(experiment))


def state_shapes(experiment: Experiment) -> TrainState:
    params = abstract(experiment.task.spec)
    opt_state = jax.eval_shape(experiment.optimizer.init, params)
    average = params if keeps_average(experiment) else None
    counters, recent = jax.eval_shape(zero_counters), recent_steps(experiment)
    hyper = jax.eval_shape(functools.partial(all_scalars, experiment))
    return TrainState(params, opt_state, hyper, counters, average, recent)


def device_bytes(tree: Any) -> int:
    """What the arrays of a tree, abstract ones too, take up on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def shardings(experiment: Experiment) -> Any:
    """A TrainState of shardings; step outputs are pinned to them, so that the step compiles once."""
    mesh, shapes, spec = experiment.mesh, state_shapes(experiment), experiment.task.spec
    if mesh is None:
        return jax.tree.map(lambda _: own_device_sharding(), shapes)
    replicated = meshes.replicated(mesh)
    params = spec_shardings(spec, mesh)
    return TrainState(
        params=params,
        opt_state=state_shardings(experiment.optimizer, spec, mesh),
        hyper=jax.tree.map(lambda _: replicated, shapes.hyper),
        counters=jax.tree.map(lambda _: replicated, shapes.counters),
        average=params if keeps_average(experiment) else None,
        recent=jax.tree.map(lambda _: replicated, shapes.recent),
    )


def spec_shardings(spec: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """A tree of shardings, one for each weight."""
    if mesh is None:
        return jax.tree.map(lambda _: own_device_sharding(), abstract(spec))
    return meshes.shardings(spec, mesh)


def own_device_sharding() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(meshes.own_devices()[0])
