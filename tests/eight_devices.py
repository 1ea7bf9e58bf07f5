"""What must hold on a mesh. tests/test_layout.py runs this file in a process of its own, with eight fake devices."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.batch import Batch
from lmjax.errors import ConfigError
from lmjax.hf.families import FAMILIES
from lmjax.hf.imported import Imported, write_checkpoint
from lmjax.hf.params import read_params
from lmjax.layout import MeshConfig, batch_sharding, make_mesh, replicated, shardings
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.optim import optimizers
from lmjax.optim.config import OptimizerConfig, ScheduleConfig, hyper
from lmjax.train.objective import LossConfig, language_model
from lmjax.train.state import TrainState, zero_counters
from lmjax.train.step import make_step, sample_keys
from lmjax.weights import abstract, by_path, initialize

pytestmark = pytest.mark.usefixtures("quick_compilation")

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=2, fsdp=4),
    "tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}
# (family, mesh, microbatches): together they have every kind of weight, dropout and accumulation.
RUNS = [("llama3", "data", 1), ("mini_gpt", "fsdp", 2), ("llama3", "tensor", 1), ("deepseek_v3", "tensor", 2)]
# Plain SGD: an update shows the gradient, where Adam's first one would show the sign of rounding errors.
OPTIMIZER = OptimizerConfig(
    name="sgd", learning_rate=1.0, clip_norm=None, schedule=ScheduleConfig(name="constant", warmup=0)
)
Cfgs = dict[str, ModelConfig]
B, T = 16, 12


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


def one_step(cfg: ModelConfig, mesh: jax.sharding.Mesh | None, microbatches: int = 1) -> tuple[TrainState, Any, Any]:
    """(declared shardings, the state after an update, its metrics)."""
    model = decoder.build(cfg)
    optimizer = optimizers.build(OPTIMIZER, model.spec)
    objective = language_model(model, LossConfig(chunk=5, z_weight=1e-3))
    step = make_step(objective, optimizer, microbatches=microbatches)

    def start() -> TrainState:
        params = initialize(model.spec, jax.random.key(0))
        return TrainState(params, optimizer.init(params), hyper(OPTIMIZER, steps=10, seed=1), {}, zero_counters())

    if mesh is None:
        return None, *jax.jit(step)(start(), {}, random_batch())
    declared = jax.tree.map(lambda _: replicated(mesh), jax.eval_shape(start))
    declared = dataclasses.replace(
        declared,
        params=shardings(model.spec, mesh),
        opt_state=optimizers.state_shardings(optimizer, model.spec, mesh),
    )
    state = jax.device_put(start(), declared)
    batch = jax.device_put(random_batch(), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(declared, None))
        return declared, *jax.block_until_ready(compiled(state, {}, batch))


SINGLE: dict[str, tuple[TrainState, Any]] = {}  # by family: what one device does


@pytest.mark.parametrize(("family", "mesh_name", "microbatches"), RUNS)
def test_a_mesh_computes_what_one_device_does(cfgs: Cfgs, family: str, mesh_name: str, microbatches: int) -> None:
    cfg = dataclasses.replace(cfgs[family], heads=4)  # which two tensor shards divide
    if family not in SINGLE:
        SINGLE[family] = one_step(cfg, None)[1:]
    expected, expected_metrics = SINGLE[family]
    mesh = make_mesh(MESHES[mesh_name])
    declared, state, metrics = one_step(cfg, mesh, microbatches)
    for name in expected_metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, err_msg=name)
    for got, want in zip(*map(jax.tree.leaves, (state.params, expected.params)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert jax.tree.map(lambda x: x.sharding, state) == declared


def test_weights_and_moments_are_split_as_their_axes_say(cfgs: Cfgs) -> None:
    spec = decoder.weights(cfgs["llama3"])
    mesh = make_mesh(MESHES["tensor"])
    declared = by_path(shardings(spec, mesh))
    axes = {path: tuple(sharding.spec) for path, sharding in declared.items()}
    block = "segments/0/0"
    assert axes["embed"] == (None, "fsdp")
    assert axes[f"{block}/attention/query"] == (None, "fsdp", "tensor", None)
    assert axes[f"{block}/attention/output"] == (None, "tensor", None, "fsdp")
    assert axes[f"{block}/mlp/up"] == (None, "fsdp", "tensor")
    optimizer = optimizers.build(OptimizerConfig(name="adamw"), spec)
    moments = jax.tree.leaves(optimizers.state_shardings(optimizer, spec, mesh))
    for sharding in set(declared.values()):
        assert moments.count(sharding) >= 2 * list(declared.values()).count(sharding)


@pytest.mark.parametrize("mesh_name", MESHES)
def test_every_family_fits_every_mesh(cfg: ModelConfig, mesh_name: str) -> None:
    """An operation that would move data unasked is an error at trace time: tracing the gradient is the test."""
    cfg = dataclasses.replace(cfg, heads=4, kv_heads=2)  # which two tensor shards divide
    model = decoder.build(cfg)
    mesh = make_mesh(MESHES[mesh_name])
    declared = shardings(model.spec, mesh)
    objective = language_model(model, LossConfig(chunk=5))
    seen: list[Any] = []

    def loss(params: Any, batch: Batch) -> jax.Array:
        seen.append(jax.typeof(model.hidden(params, batch.tokens_BT)[0]).sharding.spec)
        terms = objective.loss(params, {}, {}, batch, sample_keys(jnp.uint32(0), batch.ids_B))[0]
        return sum(jax.tree.leaves(terms))

    def placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.tree.map(placed, abstract(model.spec), declared)
    batch = jax.tree.map(lambda x: placed(x, batch_sharding(mesh)), random_batch())
    with jax.set_mesh(mesh):
        gradients = jax.eval_shape(jax.grad(loss), params, batch)
    assert [tuple(spec) for spec in seen] == [(("data", "fsdp"), None, None)]  # activations: by rows alone
    for gradient, sharding in zip(jax.tree.leaves(gradients), jax.tree.leaves(declared), strict=True):
        assert gradient.sharding.spec == sharding.spec


@pytest.mark.parametrize("mesh_name", ["fsdp", "tensor"])
def test_a_checkpoint_is_read_straight_onto_a_mesh(cfgs: Cfgs, tmp_path: Path, mesh_name: str) -> None:
    """Every device is given its own part of each tensor, as the weight's axes say."""
    pytest.importorskip("safetensors")
    cfg = dataclasses.replace(cfgs["llama3"], heads=4, kv_heads=2)
    spec = decoder.weights(cfg)
    params = initialize(spec, jax.random.key(0))
    write_checkpoint(tmp_path, Imported(cfg, params, None, {}), shard_bytes=10_000)
    declared = shardings(spec, make_mesh(MESHES[mesh_name]))
    read = read_params(tmp_path, FAMILIES["llama"], cfg, declared)
    assert jax.tree.map(lambda x: x.sharding, read) == declared
    for path, x in by_path(read).items():
        np.testing.assert_array_equal(x, by_path(params)[path], err_msg=path)


def test_splash_and_xla_on_a_mesh(cfgs: Cfgs) -> None:
    tokens_BT = np.random.default_rng(0).integers(61, size=(4, 128))
    mesh = make_mesh(MESHES["tensor"])

    def hidden(attention: str, mesh: jax.sharding.Mesh | None) -> Any:
        model = decoder.build(dataclasses.replace(cfgs["llama3"], layers=1, attention=attention))
        params = initialize(model.spec, jax.random.key(0))
        segments_BT = (tokens_BT * 0 + np.arange(128) // 50).astype(np.int32)
        if mesh is None:
            return jax.jit(lambda *inputs: model.hidden(*inputs[:2], segments_BT=inputs[2])[0])(
                params, tokens_BT, segments_BT
            )
        params = jax.device_put(params, shardings(model.spec, mesh))
        rows = jax.device_put((tokens_BT, segments_BT), batch_sharding(mesh))
        with jax.set_mesh(mesh):
            return jax.jit(lambda *inputs: model.hidden(*inputs[:2], segments_BT=inputs[2])[0])(params, *rows)

    expected = hidden("reference", None)
    for attention in ("splash", "xla"):
        np.testing.assert_allclose(hidden(attention, mesh), expected, atol=1e-5)


def test_a_mesh_takes_the_devices_it_is_given() -> None:
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[4:]).devices.ravel().tolist() == jax.devices()[4:6]
    with pytest.raises(ConfigError, match=r"fsdp 4 x tensor 4 does not fit 8 device\(s\); lower one of"):
        make_mesh(MeshConfig(fsdp=4, tensor=4))


@pytest.mark.parametrize(("axis", "name", "size"), [("fsdp", "embed", 24), ("tensor", "kv_heads", 2)])
def test_an_axis_that_a_mesh_does_not_divide_is_refused(cfgs: Cfgs, axis: str, name: str, size: int) -> None:
    devices = 5 if axis == "fsdp" else 4
    mesh = make_mesh(MeshConfig(data=1, **{axis: devices}))
    with pytest.raises(ConfigError, match=rf"mesh\.{axis}={devices} does not divide the axis '{name}' of size {size}"):
        shardings(decoder.weights(cfgs["llama3"]), mesh)
