"""Adapters on a mesh; run by test_adapters.py in a process with 8 devices."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from lmjax.config import Config
from lmjax.devices.place import shard_batch
from lmjax.errors import ConfigError
from lmjax.registry import without_data
from lmjax.run import assemble
from tests.finetune.test_low_rank import drawn
from tests.finetune.test_parts import config

pytestmark = pytest.mark.usefixtures("quick_compilation")

TUNE: dict[str, Any] = {
    "store": "int8",
    "train": ("final_norm/*",),
    "adapter": {"rank": 3, "targets": ("segments/*", "embed", "unembed")},
}


def experiment(family: str, layout: str, tune: dict[str, Any], devices: int, **mesh: int) -> Any:
    cfg = config(family, tune=tune, mesh__layout=layout, **{f"mesh__{name}": size for name, size in mesh.items()})
    model = dataclasses.replace(cfg.model, vocab=64, rope=dataclasses.replace(cfg.model.rope, scaling="none"))
    if model.moe.experts is not None:
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, experts=6))
    documents = "separate" if tune in (PROMPT, PREFIX) else "joined"
    data = dataclasses.replace(cfg.data, seq_len=16, documents=documents)
    train = dataclasses.replace(cfg.train, batch=8)
    cfg = dataclasses.replace(cfg, model=model, data=data, train=train)
    return assemble.assemble(without_data(cfg), jax.devices()[:devices] if devices > 1 else None)


def stepped(one: Any) -> tuple[Any, Any]:
    state, cfg = assemble.initial_state(one), one.cfg
    state = dataclasses.replace(
        state, params=jax.device_put(drawn(jax.device_get(state.params)), assemble.shardings(one).params)
    )
    frozen, batch = assemble.frozen_params(one), random_batch(cfg)
    placed = shard_batch(batch, one.mesh, cfg.train.batch)
    state, metrics = assemble.compiled_step(one)(state, frozen, placed)
    return jax.device_get(state.params), jax.device_get(metrics)


def random_batch(cfg: Config) -> Any:
    from lmjax.data.windows import as_batch

    rows_BU = np.random.default_rng(3).integers(0, 64, (cfg.train.batch, cfg.data.seq_len + 1)).astype(np.int32)
    segments_BU = np.broadcast_to(np.arange(cfg.data.seq_len + 1, dtype=np.int32) // 7, rows_BU.shape)
    return as_batch(rows_BU, segments_BU, np.arange(cfg.train.batch), cfg.data.documents)


@pytest.fixture(scope="module")
def alone() -> Any:
    """What one device computes, once for each way to tune."""
    cache: dict[str, Any] = {}

    def compute(family: str, tune: dict[str, Any]) -> Any:
        key = f"{family} {tune}"
        if key not in cache:
            with jax.default_device(jax.devices()[0]):
                cache[key] = stepped(experiment(family, "fsdp", tune, 1))
        return cache[key]

    return compute


DROPPED = {"adapter": {"rank": 3, "dropout": 0.25}}
PROMPT: dict[str, Any] = {"adapter": {"name": "prompt", "length": 4}}
PREFIX: dict[str, Any] = {"adapter": {"name": "prefix", "length": 4}}
OTHERS: dict[str, Any] = {
    kind: {"adapter": {"name": kind, "targets": ("*",)}} for kind in ("dora", "bottleneck", "ia3")
}


@pytest.mark.parametrize(
    ("family", "tune", "layout", "mesh"),
    [
        pytest.param("llama3", TUNE, "fsdp", {}, marks=pytest.mark.slow),
        pytest.param("llama3", TUNE, "fsdp+tp", {"tensor": 2}, marks=pytest.mark.slow),
        pytest.param("llama3", OTHERS["dora"], "fsdp+tp", {"tensor": 2}, marks=pytest.mark.slow),
        pytest.param("llama3", OTHERS["bottleneck"], "fsdp+tp", {"tensor": 2}, marks=pytest.mark.slow),
        pytest.param("llama3", OTHERS["ia3"], "fsdp+tp", {"tensor": 2}, marks=pytest.mark.slow),
        pytest.param("llama3", DROPPED, "fsdp+cp+tp", {"tensor": 2, "context": 2}, marks=pytest.mark.slow),
        ("mixtral", TUNE, "fsdp+ep", {"expert": 2, "tensor": 2}),
        ("mixtral", PROMPT, "fsdp+tp", {"tensor": 2}),
        pytest.param("llama3", PREFIX, "fsdp+tp", {"tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_that_of_one_device(
    alone: Any, family: str, tune: dict[str, Any], layout: str, mesh: dict[str, int]
) -> None:
    params, metrics = stepped(experiment(family, layout, tune, 8, **mesh))
    wanted, said = alone(family, tune)
    for name in {"loss", "grad_norm"} | ({"balance_loss"} & said.keys()):
        np.testing.assert_allclose(metrics[name][0], said[name][0], rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, wanted)


@pytest.mark.parametrize("tune", [PROMPT, PREFIX])
def test_what_is_in_front_is_refused_where_devices_share_rows(tune: dict[str, Any]) -> None:
    one = experiment("llama3", "fsdp+cp", tune, 8, context=2)
    with pytest.raises(ConfigError, match=r"mesh\.context"):
        stepped(one)
