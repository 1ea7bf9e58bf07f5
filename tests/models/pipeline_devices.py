"""What must hold of a pipeline. tests/models/test_pipeline.py runs this file in a process with eight fake devices."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import Config
from lmjax.data.batch import Batch
from lmjax.data.config import DataConfig
from lmjax.devices import rows
from lmjax.devices.config import MeshConfig
from lmjax.devices.mesh import constrain, current_mesh, make_mesh, shardings
from lmjax.devices.place import shard_batch, use_mesh
from lmjax.errors import ConfigError
from lmjax.metrics import finish
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.models.flops import matrix_products
from lmjax.models.pipeline import Schedule, pipelined
from lmjax.optim import optimizers
from lmjax.optim.config import OptimizerConfig, ScheduleConfig, hyper
from lmjax.optim.rules import OPTIMIZERS
from lmjax.plan import search, topology
from lmjax.plan.collectives import by_kind, collectives
from lmjax.plan.step import make_plan
from lmjax.record.checkpoint import Checkpoints
from lmjax.record.config import CheckpointConfig
from lmjax.run import assemble
from lmjax.run.assemble import Experiment
from lmjax.tasks.pretrain import without_data
from lmjax.train.config import LossConfig, TrainConfig
from lmjax.train.state import TrainState
from lmjax.weights import Weight, abstract, by_path, initialize

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Of momentum's first step, the state is the gradient.
SGD = OptimizerConfig(name="sgd", clip_norm=None, schedule=ScheduleConfig(name="constant", warmup=0))
Cfgs = dict[str, ModelConfig]
B, T = 16, 16


class Run(NamedTuple):
    family: str
    changes: dict[str, Any]
    mesh: MeshConfig
    microbatches: int


# Between them: a tied table at both ends, a segment before and one after the pipeline's, experts with their auxiliary
# losses, dropout, weights gathered inside a stage, several microbatches in each stage's store, recomputation.
RUNS = {
    "dp+pp+fsdp": Run(
        "deepseek_v3", {"layers": 5, "dropout": 0.1, "remat": "dots"}, MeshConfig(data=2, pipeline=2, fsdp=2), 4
    ),
    "pp+tp": Run(
        "gemma2", {"layers": 9, "heads": 4, "vocab": 62, "remat": "full"}, MeshConfig(pipeline=4, data=1, tensor=2), 8
    ),
}
CASES = ["dp+pp+fsdp", pytest.param("pp+tp", marks=pytest.mark.slow)]
MORE_RUNS = {
    "pp": Run("llama3", {"layers": 16}, MeshConfig(layout="pp"), 16),
    "dp+pp": Run("mini_gpt", {"layers": 8, "remat": "dots"}, MeshConfig(pipeline=4, data=2), 4),
    "fsdp+pp": Run("llama3", {"layers": 4, "remat": "full"}, MeshConfig(layout="fsdp+pp"), 4),
    "dp+pp+tp": Run("mini_gpt", {"layers": 4, "vocab": 62}, MeshConfig(layout="dp+pp+tp"), 8),
    "pp+tp, experts": Run(
        "mixtral", {"layers": 4, "vocab": 62, "remat": "full"}, MeshConfig(pipeline=4, data=1, tensor=2), 4
    ),
    "pp+cp+tp": Run(
        "llama3",
        {"layers": 4, "vocab": 62, "attention": "ring"},
        MeshConfig(pipeline=2, data=1, context=2, tensor=2),
        4,
    ),
    "pp+fsdp+cp": Run(
        "gemma3",
        {"layers": 7, "attention": "reference"},
        MeshConfig(pipeline=2, data=1, fsdp=2, context=2),
        8,
    ),
}


def config(model: ModelConfig, mesh: MeshConfig, microbatches: int) -> Config:
    loss = LossConfig(chunk=5, z_weight=1e-3)
    train = TrainConfig(batch=B, microbatches=microbatches, seed=1, loss=loss)
    return Config(model=model, data=DataConfig(seq_len=T), optimizer=SGD, train=train, mesh=mesh)


def random_batch() -> Batch:
    """Packed documents, and weights spread unevenly over rows."""
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(61, size=(B, T + 1)).astype(np.int32)
    weights_BT = (np.arange(T) < rng.integers(T + 1, size=(B, 1))).astype(np.float32)
    lengths = rng.integers(1, T, size=(B, 1))
    segments_BT = (np.arange(T) >= lengths).astype(np.int32)
    positions_BT = (np.arange(T) - segments_BT * lengths).astype(np.int32)
    ids_B = np.arange(100, 100 + B, dtype=np.int32)
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], weights_BT, ids_B, segments_BT, positions_BT)


class Outcome(NamedTuple):
    """Of one step."""

    state: TrainState
    metrics: dict[str, float]
    program: str


class Comparison(NamedTuple):
    """Of one step from the same state."""

    experiment: Experiment
    got: Outcome
    """On the mesh."""
    want: Outcome
    """On one device."""


def one_step(experiment: Experiment) -> Outcome:
    state = assemble.initial_state(experiment)
    assert jax.tree.map(lambda x: x.sharding, state) == assemble.shardings(experiment)
    batch = shard_batch(random_batch(), experiment.mesh, B)
    with use_mesh(experiment.mesh):
        program = assemble.jitted_step(experiment).lower(state, {}, batch).compile()
        state, metrics = jax.block_until_ready(program(state, {}, batch))
    return Outcome(state, finish(metrics), program.as_text())


def alone(experiment: Experiment) -> Experiment:
    """The same on one device."""
    return assemble.assemble(without_data(replace(experiment.cfg, mesh=MeshConfig(data=1))))


def config_of(run: Run, cfgs: Cfgs) -> Config:
    return config(replace(cfgs[run.family], **run.changes), run.mesh, run.microbatches)


def comparison(run: Run, cfgs: Cfgs) -> Comparison:
    experiment = assemble.assemble(without_data(config_of(run, cfgs)))
    return Comparison(experiment, one_step(experiment), one_step(alone(experiment)))


@pytest.fixture(scope="module")
def compared(cfgs: Cfgs) -> Callable[[str], Comparison]:
    """One of RUNS, for several tests."""
    return functools.cache(lambda name: comparison(RUNS[name], cfgs))


def check(compared: Comparison) -> None:
    """Loss, norm of the gradient and other metrics to 1e-5, each leaf of the gradient to 1e-4 of its largest entry."""
    experiment, got, want = compared
    assert got.metrics == pytest.approx(want.metrics, rel=1e-5)
    gradients, expected = by_path(got.state.opt_state[0].trace), by_path(want.state.opt_state[0].trace)
    for path, leaf in expected.items():
        # Attention does not see a bias of its keys: what little gradient they have is rounding.
        tolerance = 1e-4 * np.abs(leaf).max() + 1e-8
        np.testing.assert_allclose(gradients[path], leaf, rtol=0, atol=tolerance, err_msg=path)
    assert jax.tree.map(lambda x: x.sharding, got.state) == assemble.shardings(experiment)


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_computes_what_one_device_does(compared: Any, name: str) -> None:
    check(compared(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_RUNS)
def test_other_pipelines_compute_what_one_device_does(cfgs: Cfgs, name: str) -> None:
    check(comparison(MORE_RUNS[name], cfgs))


# Where things lie, and what is sent --------------------------------------------------------------------------------


def test_a_checkpoint_does_not_know_of_stages(compared: Any, tmp_path: Any) -> None:
    """Restored, the state lies as declared, and one device restores it whole."""
    experiment, (state, *_), _ = compared("dp+pp+fsdp")
    declared = assemble.shardings(experiment)
    first, stages = (declared.params["segments"][segment]["0"]["attention"]["query"] for segment in "01")
    assert tuple(first.spec) == (None, "fsdp", None, None)
    assert tuple(stages.spec) == ("pipeline", "fsdp", None, None)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state, {}, value=None)
    checkpoints.wait()
    restored, whole = (checkpoints.restore(assemble.abstract_state(e))[0] for e in (experiment, alone(experiment)))
    assert jax.tree.map(lambda x: x.sharding, restored) == declared
    for other in (restored, whole):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(other), jax.device_get(state))
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(whole))


@pytest.mark.parametrize("name", CASES)
def test_stages_send_each_other_activations_and_keep_their_weights(compared: Any, name: str) -> None:
    experiment, (*_, program), _ = compared(name)
    cfg, mesh, spec = experiment.cfg, experiment.mesh, by_path(experiment.task.spec)
    stages, microbatches = mesh.shape["pipeline"], cfg.train.microbatches
    sent = collectives(program)
    across = [one for one in sent if "pipeline" in one.axes(mesh.shape)]

    # Onward and round the stores, forward and backward, at every tick: one microbatch.
    permutes = [one for one in across if one.kind == "collective-permute"]
    assert [one.times for one in permutes] == 4 * [microbatches + stages - 1]
    activations = 4 * B // microbatches * T * cfg.model.embed
    assert {one.bytes for one in permutes} == {activations // (mesh.size // stages)}

    # What else crosses stages does so once: what the layers read of each row, and gradients of weights outside them.
    others = [one for one in across if one not in permutes]
    outside = 4 * sum(math.prod(weight.shape) for weight in spec.values() if "layers" not in weight.batch_axes)
    assert all(one.times == 1 and one.bytes <= outside for one in others), others

    # Within a stage, weights are gathered one layer at a time, and not as a stack.
    stacks = [weight.shape for weight in spec.values() if weight.kind == "matmul" and "layers" in weight.batch_axes]
    shapes = {(layers // pieces, *rest) for layers, *rest in stacks for pieces in (1, stages)}
    stacked = {f"f32[{','.join(map(str, shape))}]" for shape in shapes}
    assert not [one for one in sent if one.kind == "all-gather" and one.shape in stacked]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_keeps_its_state_where_the_stages_are(cfgs: Cfgs, name: str) -> None:
    cfg = OptimizerConfig(name=name, schedule=ScheduleConfig(warmup=0))
    spec = decoder.weights(replace(cfgs["llama3"], layers=2, embed=128, mlp=128))
    mesh = make_mesh(MeshConfig(pipeline=2, data=2, fsdp=2))
    optimizer = optimizers.build(cfg, spec)
    lying = shardings(spec, mesh), optimizers.state_shardings(optimizer, spec, mesh)

    def placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params, state = jax.tree.map(placed, (abstract(spec), jax.eval_shape(optimizer.init, abstract(spec))), lying)
    with jax.set_mesh(mesh):
        new = jax.eval_shape(
            optimizer.update, params, state, params, hyper(cfg, steps=10), jnp.int32(0), jnp.float32(1)
        )
    for got, want in zip(jax.tree.leaves(new), jax.tree.leaves(lying), strict=True):
        assert got.sharding.spec == want.spec


# Layers ------------------------------------------------------------------------------------------------------------


def test_metrics_of_layers_are_summed_and_differentiated() -> None:
    """A toy stage whose layers add to a sum, read rows of the context and one row for all, and know their number."""
    rng = np.random.default_rng(0)
    w_L, x_BTD = rng.normal(size=8).astype(np.float32), rng.normal(size=(B, T, 4)).astype(np.float32)
    rows_BT, one_1T = rng.normal(size=(B, T)).astype(np.float32), rng.normal(size=(1, T)).astype(np.float32)

    def stage(context: Any, x_BTD: jax.Array, w_L: jax.Array, first: Any) -> Any:
        def layer(x_BTD: jax.Array, inputs: Any) -> Any:
            w, number = inputs
            x_BTD = jnp.tanh(x_BTD * w + (context["rows"] + context["one"])[..., None] + number)
            return x_BTD, {"sum": jnp.sum(x_BTD**2)}

        return jax.lax.scan(layer, x_BTD, (w_L, first + jnp.arange(len(w_L))))

    def loss(run: Any) -> Any:
        def total(w_L: jax.Array, x_BTD: jax.Array, rows_BT: jax.Array) -> Any:
            y_BTD, metrics = run(stage, {"rows": rows_BT, "one": jnp.asarray(one_1T)}, x_BTD, w_L)
            weights_L = jnp.arange(1, 9.0)
            if current_mesh() is not None:
                weights_L = constrain(weights_L, "layers")
            return jnp.sum(y_BTD * x_BTD) + jnp.sum(metrics["sum"] * weights_L), (y_BTD, metrics)

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))

    want = loss(lambda stage, *arguments: stage(*arguments, 0))(w_L, x_BTD, rows_BT)
    mesh = make_mesh(MeshConfig(pipeline=4, data=2))
    place = functools.partial(jax.device_put, device=rows.row_sharding(mesh, "batch"))
    for microbatches in (None, 8):
        run = functools.partial(pipelined, microbatches=microbatches)
        layers = jax.device_put(w_L, shardings({"w": Weight("layers | ->", sizes=(8,))}, mesh)["w"])
        with jax.set_mesh(mesh):
            got = loss(run)(layers, place(x_BTD), place(rows_BT))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("microbatches", [4, 8])
def test_the_bubble_is_what_stages_do_in_vain(microbatches: int) -> None:
    """Forward and backward, how often the program applies a stage's one layer, which is a matrix product."""

    def stage(context: None, x_BTD: jax.Array, w_LDE: jax.Array, first: jax.Array) -> Any:
        return x_BTD @ w_LDE[0], None

    def total(w_LDE: jax.Array, x_BTD: jax.Array) -> jax.Array:
        return jnp.sum(pipelined(stage, None, x_BTD, w_LDE, microbatches)[0])

    mesh = make_mesh(MeshConfig(pipeline=4, data=2))
    w_LDE = jax.device_put(np.ones((4, 3, 3)), shardings({"w": Weight("layers | ->", sizes=(4,))}, mesh)["w"])
    with jax.set_mesh(mesh):
        x_BTD = jax.device_put(np.ones((B, T, 3)), rows.row_sharding(mesh, "batch"))
        program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(w_LDE, x_BTD).jaxpr
    times = [product.times for product in matrix_products(program)]
    assert len(times) >= 3 and len(set(times)) == 1
    assert 1 - microbatches / times[0] == pytest.approx(Schedule(4, microbatches).bubble)


def test_a_pipeline_also_runs_without_training(cfgs: Cfgs) -> None:
    """Evaluation: no dropout, one microbatch for each stage unless told otherwise."""
    cfg = replace(cfgs["mini_gpt"], layers=4)
    model, tokens_BT = decoder.build(cfg), random_batch().tokens_BT
    params = initialize(model.spec, jax.random.key(0))
    want = jax.jit(lambda params, tokens_BT: model.hidden(params, tokens_BT)[0])(params, tokens_BT)
    mesh = make_mesh(MeshConfig(pipeline=4, data=2))
    params = jax.device_put(params, shardings(model.spec, mesh))
    with jax.set_mesh(mesh):
        tokens_BT = jax.device_put(tokens_BT, rows.row_sharding(mesh, "batch time"))
        got = jax.jit(lambda params, tokens_BT: model.hidden(params, tokens_BT)[0])(params, tokens_BT)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_search_fills_pipelines_and_a_plan_compiles_them(cfgs: Cfgs, monkeypatch: pytest.MonkeyPatch) -> None:
    target = topology.parse("cpu-8")
    layouts = [
        (sizes, mesh)
        for sizes, mesh in search.meshes(8, MeshConfig())
        if mesh == MeshConfig(layout="dp+pp", pipeline=2)
    ]
    monkeypatch.setattr(search, "meshes", lambda *_: layouts)
    cfg = config(replace(cfgs["llama3"], layers=2), MeshConfig(), 1)
    found = list(search.candidates(cfg, target, jax.devices()))
    assert {one.cfg.train.microbatches for one in found} == {2, 4}  # more leave a device no row
    plan = make_plan(found[0].cfg, target, jax.devices())
    assert plan.fits and plan.mesh["pipeline"] == 2
    assert plan.compiled is not None and by_kind(plan.compiled.collectives)["collective-permute"] > 0


# Sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layers", "microbatches", "message"),
    [
        ("llama3", 6, 4, r"mesh.pipeline=4 does not divide model.layers of size 6; use 3 or 6 devices, or .* 4 or 8"),
        ("gemma2", 7, 4, r"mesh.pipeline=4 does not divide the periods of 2 layers in model.layers=7 of size 3; use 3"),
        ("llama3", 4, 1, r"mesh.pipeline=4 does not divide train.microbatches of size 1; .*, or a size of 4$"),
        ("llama3", 4, 16, r"mesh.data=2 does not divide train.batch / train.microbatches of size 1; .* a size of 2"),
    ],
)
def test_what_does_not_divide_is_refused(cfgs: Cfgs, family: str, layers: int, microbatches: int, message: str) -> None:
    cfg = config(replace(cfgs[family], layers=layers), MeshConfig(pipeline=4, data=2), microbatches)
    with pytest.raises(ConfigError, match=message):
        assemble.assemble(without_data(cfg))
