"""What must hold on a mesh. tests/devices/test_mesh.py runs this file in a process of its own, with eight fake devices.

Every step is awaited: collectives of two steps in flight wait for each other on XLA's CPU backend.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lmjax.config import Config
from lmjax.data.batch import Batch
from lmjax.data.config import DataConfig
from lmjax.devices import place
from lmjax.devices.config import MeshConfig
from lmjax.devices.gather import gather_copies
from lmjax.devices.mesh import GATHERED, LAYOUTS, SHARDING_RULES, make_mesh, mesh_axes, shardings
from lmjax.devices.rows import axes, check_batch, map_arrays, row_sharding, time_order
from lmjax.errors import ConfigError
from lmjax.hf.families import FAMILIES
from lmjax.hf.imported import Imported, write_checkpoint
from lmjax.hf.params import read_params
from lmjax.metrics import finish
from lmjax.models import decoder
from lmjax.models.config import ModelConfig, MoeConfig
from lmjax.models.layers import lookup_tokens
from lmjax.models.model import Model
from lmjax.optim import optimizers
from lmjax.optim.config import OptimizerConfig, ScheduleConfig, hyper
from lmjax.optim.rules import OPTIMIZERS
from lmjax.plan.collectives import Collective, collectives
from lmjax.record.checkpoint import Checkpoints
from lmjax.run import assemble
from lmjax.run.assemble import Experiment
from lmjax.tasks.pretrain import without_data
from lmjax.train.config import LossConfig, TrainConfig
from lmjax.train.objective import language_model, scalar_arrays
from lmjax.train.state import TrainState
from lmjax.train.step import sample_keys
from lmjax.weights import Weight, abstract, by_path, initialize

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, V = 16, 32, 64
# Everything at once: two kinds of layers, grouped heads, window, softcap, biases, dropout, packed documents.
MODEL = ModelConfig(
    vocab=V,
    context=T,
    layers=4,
    pattern=("local", "global"),
    window=7,
    embed=32,
    heads=16,
    kv_heads=8,
    head_dim=6,
    mlp=48,
    gated=True,
    bias=True,
    attention_softcap=5.0,
    dropout=0.1,
    embed_dropout=0.1,
)
CONFIG = Config(
    model=MODEL,
    data=DataConfig(seq_len=T, documents="separate"),
    # Of momentum's first step, the state is the gradient.
    optimizer=OptimizerConfig(name="sgd", clip_norm=None, schedule=ScheduleConfig(name="constant", warmup=0)),
    train=TrainConfig(batch=B, seed=1, loss=LossConfig(chunk=5, z_weight=1e-3)),
)
# Biased sigmoids, capacity that not all choices fit in, shared experts, both auxiliary losses, two microbatches.
MIXTURE = ModelConfig(
    vocab=V,
    layers=2,
    embed=32,
    heads=4,
    mlp=48,
    bias=True,
    moe=MoeConfig(
        experts=4,
        top_k=2,
        mlp=16,
        score="sigmoid",
        dispatch="capacity",
        capacity_factor=1.0,
        shared_mlp=16,
        shared_gate=True,
        router_z_weight=1e-3,
        bias_rate=1e-3,
    ),
)
ACCUMULATING = replace(CONFIG, model=MIXTURE, train=replace(CONFIG.train, microbatches=2))
CONFIGS = {
    "dense": CONFIG,
    "capacity": ACCUMULATING,
    "dropping": replace(CONFIG, model=replace(MODEL, attention_dropout=0.2)),
    "dropless": replace(ACCUMULATING, model=replace(MIXTURE, moe=replace(MIXTURE.moe, dispatch="dropless"))),
}
Cfgs = dict[str, ModelConfig]


def random_batch() -> Batch:
    """Packed documents, and weights spread unevenly over rows."""
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(V, size=(B, T + 1)).astype(np.int32)
    weights_BT = (np.arange(T) < rng.integers(T + 1, size=(B, 1))).astype(np.float32)
    lengths = rng.integers(1, T, size=(B, 1))
    segments_BT = (np.arange(T) >= lengths).astype(np.int32)
    positions_BT = (np.arange(T) - segments_BT * lengths).astype(np.int32)
    ids_B = np.arange(100, 100 + B, dtype=np.int32)
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], weights_BT, ids_B, segments_BT, positions_BT)


def experiment(layout: str = "dp", model: str = "dense", **sizes: int) -> Experiment:
    return assemble.assemble(without_data(replace(CONFIGS[model], mesh=MeshConfig(layout=layout, **sizes))))


def compiled(experiment: Experiment) -> Any:
    """The train step's program."""
    step = assemble.jitted_step(experiment)
    with place.use_mesh(experiment.mesh):
        return step.lower(assemble.abstract_state(experiment), {}, assemble.abstract_batch(experiment)).compile()


def one_step(experiment: Experiment, program: Any) -> tuple[TrainState, dict[str, float]]:
    """(the state after an update, its metrics)."""
    state = assemble.initial_state(experiment)
    assert jax.tree.map(lambda x: x.sharding, state) == assemble.shardings(experiment)
    batch = place.shard_batch(random_batch(), experiment.mesh, B)
    state, metrics = jax.block_until_ready(program(state, {}, batch))
    return state, finish(metrics)


@functools.cache
def on_one_device(model: str) -> tuple[TrainState, dict[str, float]]:
    alone = experiment(model=model)._replace(mesh=None)
    return one_step(alone, compiled(alone))


def check_step(experiment: Experiment, model: str = "dense") -> TrainState:
    """One step equals that of one device, and leaves everything where it was declared to lie."""
    expected, expected_metrics = on_one_device(model)
    program = compiled(experiment)
    state, metrics = one_step(experiment, program)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)
    gradients, expected_gradients = by_path(state.opt_state[0].trace), by_path(expected.opt_state[0].trace)
    for path, want in expected_gradients.items():
        np.testing.assert_allclose(gradients[path], want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=path)
    assert jax.tree.map(lambda x: x.sharding, state) == assemble.shardings(experiment)
    if model not in ("capacity", "dropping"):  # for which every device gathers whole rows
        check_budget(experiment, collectives(program.as_text()))
    return state


def check_budget(experiment: Experiment, found: list[Collective]) -> None:
    """What one device may gather at once, and send in a step.

    Gradients are scattered along the axes that weights are gathered along, then their pieces are added up along others.
    XLA's CPU backend adds up the gradient of a layer's input for each weight that read it: five times for two parts of
    a layer; and everywhere, to cut it afterwards, which sends twice as much as a reduce-scatter.
    """
    mesh, cfg = experiment.mesh, experiment.cfg
    assert mesh is not None
    layers, microbatches = cfg.model.layers, cfg.train.microbatches

    def pieces(*names: str) -> int:
        return math.prod(mesh.shape[axis] for name in names for axis in mesh_axes(name, mesh) if axis not in GATHERED)

    weights = by_path(experiment.task.spec).values()
    layer_of = [w.of_layer() if w.names[0] == "layers" else w for w in weights]
    largest = max(4 * w.size / pieces(*w.names) for w in layer_of)
    everything = 1.02 * sum((1 + w.tied) * 4 * w.size / pieces(*w.names) for w in weights) * microbatches
    gathered, copies = (
        math.prod(mesh.shape[axis] for axis in axes) for axes in (GATHERED, {*SHARDING_RULES["batch"]} - {*GATHERED})
    )
    rows = B / microbatches / math.prod(mesh.shape[axis] for axis in mesh_axes("batch", mesh))
    tokens = 4 * rows * T / mesh.shape["context"]
    x, kv = (
        tokens * cfg.model.embed,
        tokens * 2 * math.prod(cfg.model.dims[n] for n in ("kv_heads", "head_dim")) / pieces("kv_heads"),
    )
    limits = {
        "all-gather of weights": 2 * everything,  # forward and backward
        "all-gather of x": microbatches * (4 * layers + 3) * x,
        "reduce of weights": 1.1 * ((gathered > 1) + 2 * (copies > 1) / gathered) * everything,
        "reduce of x": 1.1 * microbatches * 2 * (7 * layers + 2) * x,
        "collective-permute of weights": 1.1 * microbatches * 3 * layers * mesh.shape["context"] * kv,  # ring attention
        # Of a mixture, the choices of all tokens in room for all devices' choices, there and back, and their gradients.
        "all-to-all of weights": 1.1 * microbatches * 4 * layers * mesh.shape["expert"] * cfg.model.moe.top_k * x,
    }
    sent: dict[str, float] = Counter()
    for one in found:
        over = "x" if "tensor" in one.axes(mesh.shape) else "weights"
        sent[f"{'reduce' if 'reduce' in one.kind else one.kind} of {over}"] += one.sent
        if one.kind == "all-gather":
            assert set(one.axes(mesh.shape)) <= {"tensor"} or set(one.axes(mesh.shape)) <= set(GATHERED), one
            assert one.bytes <= (x if over == "x" else largest), one
    for name, n in sent.items():
        assert n <= limits.get(name, 0), (name, n, limits)


QUICK = ("dp", "fsdp+cp+tp")  # together they split over every axis
OTHERS = [layout for layout, axes in LAYOUTS.items() if layout not in QUICK and "pipeline" not in axes]
SLOW = [pytest.param(layout, marks=pytest.mark.slow) for layout in OTHERS]  # pipelines: pipeline_devices.py


@pytest.mark.parametrize("layout", [*QUICK, *SLOW])
def test_every_layout_computes_what_one_device_does(layout: str, tmp_path: Path) -> None:
    run = experiment(layout)
    state = check_step(run)
    checkpoints = Checkpoints(tmp_path, run.cfg.checkpoint)
    checkpoints.save(1, state, {}, value=None)
    checkpoints.wait()
    restored, _, _ = checkpoints.restore(assemble.abstract_state(run))
    assert jax.tree.map(lambda x: x.sharding, restored) == assemble.shardings(run)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp+cp+tp", "dp+cp+tp"])
def test_attention_weights_are_dropped_as_on_one_device(layout: str) -> None:
    check_step(experiment(layout, "dropping"), "dropping")


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "sizes"), [("fsdp", {"slices": 2}), ("fsdp+tp", {"data": 2, "tensor": 2})])
def test_sizes_beside_those_of_a_layout(layout: str, sizes: dict[str, int]) -> None:
    check_step(experiment(layout, **sizes))


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "growth"), [("ring", 1.3), ("reference", None)])
def test_memory_of_long_rows(attention: str, growth: float | None) -> None:
    """A row eight times as long over eight devices: with ring attention a device holds little more; else much more."""

    def temporaries(devices: int) -> float:
        long = ModelConfig(vocab=V, layers=4, embed=64, heads=2, mlp=128, attention=attention)
        cfg = Config(model=long, data=DataConfig(seq_len=512 * devices), train=TrainConfig(batch=1))
        run = assemble.assemble(without_data(replace(cfg, mesh=MeshConfig(layout="cp"))), jax.devices()[:devices])
        return compiled(run).memory_analysis().temp_size_in_bytes

    jax.config.update("jax_disable_most_optimizations", False)
    found = temporaries(8) / temporaries(1)
    assert found <= growth if growth else found > 3


@pytest.mark.parametrize(
    ("dispatch", "layout", "sizes"),
    [
        pytest.param("capacity", "fsdp+ep", {"context": 2}, marks=pytest.mark.slow),
        pytest.param("capacity", "dp+cp+tp", {}, marks=pytest.mark.slow),
        ("dropless", "fsdp+ep", {"tensor": 2}),
        pytest.param("dropless", "ep", {"expert": 4, "context": 2}, marks=pytest.mark.slow),
        pytest.param("dropless", "fsdp+cp+tp", {}, marks=pytest.mark.slow),
    ],
)
def test_mixtures_on_a_mesh(dispatch: str, layout: str, sizes: dict[str, int]) -> None:
    """Experts spread over devices, each with its own tokens; two microbatches."""
    check_step(experiment(layout, dispatch, **sizes), dispatch)


# What lies where --------------------------------------------------------------------------------------------------


def test_weights_and_moments_are_split_as_their_axes_say(cfgs: Cfgs) -> None:
    spec = decoder.weights(replace(cfgs["llama3"], vocab=V))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    declared = by_path(shardings(spec, mesh))
    axes = {path: tuple(sharding.spec) for path, sharding in declared.items()}
    block = "segments/0/0"
    assert axes["embed"] == ("tensor", "fsdp")
    assert axes[f"{block}/attention/query"] == (None, "fsdp", "tensor", None)
    assert axes[f"{block}/attention/output"] == (None, "tensor", None, "fsdp")
    assert axes[f"{block}/mlp/up"] == (None, "fsdp", "tensor")
    optimizer = optimizers.build(OptimizerConfig(name="adamw"), spec)
    moments = jax.tree.leaves(optimizers.state_shardings(optimizer, spec, mesh))
    for sharding in set(declared.values()):
        assert moments.count(sharding) >= 2 * list(declared.values()).count(sharding)


@pytest.mark.parametrize(
    ("layers", "split"), [(8, ("fsdp", "context", "tensor")), (4, ("fsdp", "context")), (6, ("fsdp",)), (3, ())]
)
def test_layers_are_spread_to_be_whole(layers: int, split: tuple[str, ...]) -> None:
    """What Muon iterates on: without it every device would do all layers."""
    mesh = make_mesh(MeshConfig(layout="fsdp+cp+tp"))
    lies = shardings({"w": Weight("layers | embed -> mlp", sizes=(layers, 16, 8))}, mesh)["w"]
    stack = jax.device_put(np.arange(layers * 128.0).reshape(layers, 16, 8), lies)
    with jax.set_mesh(mesh):
        whole = gather_copies(stack, ("layers",))
    assert whole.sharding.spec == jax.P(split or None, None, None)
    np.testing.assert_array_equal(whole, stack)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_updates_split_experts(name: str) -> None:
    """Updates lie as the weights, the next state as the first."""
    cfg, spec, mesh = OptimizerConfig(name=name), decoder.weights(MIXTURE), make_mesh(MeshConfig(layout="fsdp+ep"))
    optimizer = optimizers.build(cfg, spec)
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract(spec),
        shardings(spec, mesh),
    )

    def update(params: Any, state: Any) -> Any:
        return optimizer.update(params, state, params, hyper(cfg, steps=1000), jnp.int32(0), jnp.float32(1))

    with jax.set_mesh(mesh):
        state = jax.eval_shape(optimizer.init, params)
        after = jax.eval_shape(update, params, state)
    for got, want in zip(jax.tree.leaves(after), jax.tree.leaves((params, state)), strict=True):
        spec_of_got, spec_of_want = (tuple(getattr(x.sharding, "spec", ())) for x in (got, want))  # a count has none
        assert spec_of_got == spec_of_want


@flax.struct.dataclass
class Seen:
    """A batch with an image beside each row's text."""

    tokens_BT: Any = axes("batch time")
    patches_BPD: Any = axes("batch patch embed")
    ids_B: Any = axes("batch")


def test_only_what_has_a_time_axis_is_put_in_the_order_of_time() -> None:
    """Devices that share rows hold zig-zag parts of their tokens; other axes stay as they are, and whole."""
    mesh = make_mesh(MeshConfig(layout="fsdp+cp", context=4))
    batch = Seen(np.arange(B * T).reshape(B, T), np.arange(B * 8 * 3).reshape(B, 8, 3), np.arange(B))
    placed = place.shard_batch(batch, mesh, B)
    assert placed.tokens_BT.sharding.spec == PartitionSpec("fsdp", "context")
    np.testing.assert_array_equal(placed.tokens_BT, batch.tokens_BT[:, time_order(T, 4)])
    assert placed.patches_BPD.sharding.spec == PartitionSpec("fsdp", None, None)
    np.testing.assert_array_equal(placed.patches_BPD, batch.patches_BPD)
    np.testing.assert_array_equal(placed.ids_B, batch.ids_B)


def summed_loss(model: Model) -> Callable[[Any, Batch], jax.Array]:
    """(params, batch) -> what a train step would minimize, but for its weights."""
    objective = language_model(model, LossConfig(chunk=5))

    def loss(params: Any, batch: Batch) -> jax.Array:
        keys_B, hyper = sample_keys(jnp.uint32(0), batch.ids_B), scalar_arrays(objective.scalars)
        return optax.tree.sum(objective.loss(params, {}, batch, keys_B, hyper)[0])

    return loss


@pytest.mark.parametrize(
    "layout", ["fsdp+cp+tp", *(pytest.param(one, marks=pytest.mark.slow) for one in ("dp", "fsdp+tp"))]
)
def test_every_family_fits_every_mesh(cfg: ModelConfig, layout: str) -> None:
    """An operation that would move data unasked is an error at trace time: tracing the gradient is the test."""
    model = decoder.build(replace(cfg, heads=4, kv_heads=2, vocab=V))  # which two tensor shards divide
    mesh = make_mesh(MeshConfig(layout=layout))
    declared = shardings(model.spec, mesh)

    def placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.tree.map(placed, abstract(model.spec), declared)
    batch = map_arrays(lambda names, x: placed(x, row_sharding(mesh, names)), random_batch())
    with jax.set_mesh(mesh):
        x_BTD = jax.eval_shape(model.hidden, params, batch.tokens_BT)[0]
        gradients = jax.eval_shape(jax.grad(summed_loss(model)), params, batch)
    rows_spec = row_sharding(mesh, "batch time").spec
    assert x_BTD.sharding.spec == rows_spec.update((*rows_spec, None))
    for gradient, sharding in zip(jax.tree.leaves(gradients), jax.tree.leaves(declared), strict=True):
        assert gradient.sharding.spec == sharding.spec


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "fsdp+cp+tp"])
def test_every_family_computes_what_one_device_does(cfg: ModelConfig, layout: str) -> None:
    model = decoder.build(replace(cfg, heads=4, kv_heads=2, vocab=V, remat="full"))
    mesh, run = make_mesh(MeshConfig(layout=layout)), jax.jit(jax.value_and_grad(summed_loss(model)))
    params = initialize(model.spec, jax.random.key(0))
    expected, expected_gradients = run(params, random_batch())
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(model.spec, mesh)), place.shard_batch(random_batch(), mesh, B)
        loss, gradients = jax.block_until_ready(run(*placed))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    largest = max(np.abs(want).max() for want in jax.tree.leaves(expected_gradients))
    for path, want in by_path(expected_gradients).items():
        # Of a bias of keys the gradient is 0, but for rounding.
        np.testing.assert_allclose(
            np.asarray(by_path(gradients)[path]),
            want,
            rtol=0,
            atol=1e-4 * np.abs(want).max() + 1e-6 * largest,
            err_msg=path,
        )


@pytest.mark.parametrize("layout", ["fsdp", "fsdp+tp"])
def test_a_checkpoint_is_read_straight_onto_a_mesh(cfgs: Cfgs, tmp_path: Path, layout: str) -> None:
    """Every device is given its own part of each tensor, as the weight's axes say."""
    pytest.importorskip("safetensors")
    cfg = replace(cfgs["llama3"], vocab=V, heads=4, kv_heads=2)
    spec = decoder.weights(cfg)
    params = initialize(spec, jax.random.key(0))
    write_checkpoint(tmp_path, Imported(cfg, params, None, {}), shard_bytes=10_000)
    declared = shardings(spec, make_mesh(MeshConfig(layout=layout)))
    read = read_params(tmp_path, FAMILIES["llama"], cfg, declared)
    assert jax.tree.map(lambda x: x.sharding, read) == declared
    for path, x in by_path(read).items():
        np.testing.assert_array_equal(x, by_path(params)[path], err_msg=path)


@pytest.mark.parametrize("layout", [None, "dp", "fsdp+tp"])
def test_a_frequent_token_adds_up_its_gradient_in_float32(layout: str | None) -> None:
    """In bfloat16 1 + ... + 1 would end at 256."""
    mesh = None if layout is None else make_mesh(MeshConfig(layout=layout))
    table_VD, ids_BT = np.zeros((V, 8), np.float32), np.zeros((16, 256), np.int32)
    ids_BT[:, 0] = 1

    def total(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        return jnp.sum(lookup_tokens(table_VD, ids_BT, jnp.bfloat16), dtype=jnp.float32)

    with place.use_mesh(mesh):
        if mesh is not None:
            table_VD = jax.device_put(
                table_VD, shardings({"embed": Weight("vocab -> embed", sizes=(V, 8))}, mesh)["embed"]
            )
            ids_BT = place.shard_array(ids_BT, "batch time", mesh, 16)
        gradient_VD = np.asarray(jax.jit(jax.grad(total))(table_VD, ids_BT))
    np.testing.assert_array_equal(gradient_VD[0], 16 * 255)
    np.testing.assert_array_equal(gradient_VD[1], 16)


def test_splash_and_xla_on_a_mesh(cfgs: Cfgs) -> None:
    tokens_BT = np.random.default_rng(0).integers(61, size=(4, 128))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))

    def hidden(attention: str, mesh: jax.sharding.Mesh | None) -> Any:
        model = decoder.build(replace(cfgs["llama3"], vocab=V, layers=1, attention=attention))
        params = initialize(model.spec, jax.random.key(0))
        segments_BT = (tokens_BT * 0 + np.arange(128) // 50).astype(np.int32)
        if mesh is None:
            return jax.jit(lambda *inputs: model.hidden(*inputs[:2], segments_BT=inputs[2])[0])(
                params, tokens_BT, segments_BT
            )
        params = jax.device_put(params, shardings(model.spec, mesh))
        rows = [place.shard_array(x, "batch time", mesh, len(x)) for x in (tokens_BT, segments_BT)]
        with jax.set_mesh(mesh):
            return jax.jit(lambda *inputs: model.hidden(*inputs[:2], segments_BT=inputs[2])[0])(params, *rows)

    expected = hidden("reference", None)
    for attention in ("splash", "xla"):
        np.testing.assert_allclose(hidden(attention, mesh), expected, atol=1e-5)


# Sizes ------------------------------------------------------------------------------------------------------------


def shape(**config: Any) -> dict[str, int]:
    return {axis: size for axis, size in make_mesh(MeshConfig(**config)).shape.items() if size > 1}


def test_a_mesh_takes_the_devices_it_is_given() -> None:
    assert shape() == {"data": 8}
    assert shape(fsdp=2, tensor=2) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert shape(layout="fsdp+tp") == {"fsdp": 4, "tensor": 2}
    assert shape(layout="fsdp+tp", tensor=4) == {"fsdp": 2, "tensor": 4}
    assert shape(layout="dp+cp+tp") == {"data": 2, "context": 2, "tensor": 2}
    assert shape(layout="fsdp", slices=2) == {"slices": 2, "fsdp": 4}
    assert make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[4:]).devices.ravel().tolist() == jax.devices()[4:6]
    with pytest.raises(ConfigError, match=r"fsdp 4 x tensor 4 = 16 does not divide 8 device\(s\).* make it 8, or set"):
        make_mesh(MeshConfig(fsdp=4, tensor=4))
    with pytest.raises(ConfigError, match=r"fsdp 3 = 3 does not divide 8 .* make it 2 or 4, or set mesh.data"):
        make_mesh(MeshConfig(fsdp=3))
    with pytest.raises(ConfigError, match=r"data 2 x fsdp 8 = 16 does not fit 8 device\(s\); lower one"):
        make_mesh(MeshConfig(data=2, fsdp=8))


@pytest.mark.parametrize(("axis", "name", "size"), [("fsdp", "embed", 24), ("tensor", "kv_heads", 2)])
def test_an_axis_that_a_mesh_does_not_divide_is_refused(cfgs: Cfgs, axis: str, name: str, size: int) -> None:
    devices, near = (5, "4 or 6 devices, or a size of 20 or 25") if axis == "fsdp" else (4, "2 devices, or a size of 4")
    mesh = make_mesh(MeshConfig(data=1, **{axis: devices}))
    match = rf"mesh\.{axis}={devices} does not divide the axis '{name}' of size {size}; use {near}"
    with pytest.raises(ConfigError, match=match):
        shardings(decoder.weights(replace(cfgs["llama3"], vocab=V)), mesh)


def test_a_batch_that_a_mesh_does_not_divide_is_refused() -> None:
    mesh = make_mesh(MeshConfig(layout="dp+cp+tp"))
    check_batch(mesh, rows=6, setting="train.batch", T=8)
    with pytest.raises(ConfigError, match=r"mesh\.data=2 does not divide train\.batch of size 3; .* a size of 2 or 4"):
        check_batch(mesh, rows=3, setting="train.batch", T=8)
    with pytest.raises(ConfigError, match=r"mesh\.context=2 x mesh\.tensor=2 does not divide data\.seq_len of size 10"):
        check_batch(mesh, rows=2, setting="train.batch", T=10)
    with pytest.raises(ConfigError, match=r"mesh\.context=8 cuts rows into 16 chunks, which do not divide .*=24"):
        check_batch(make_mesh(MeshConfig(layout="cp")), rows=2, setting="train.batch", T=24)
