"""Meshes. jax fixes its devices when it starts, so what needs eight of them runs in a process of its own."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from lmjax.devices.config import MeshConfig
from lmjax.devices.gather import gather
from lmjax.devices.mesh import AXES, LAYOUTS, SHARDING_RULES, constrain, current_mesh, make_mesh, partition_spec
from lmjax.devices.rows import time_order
from lmjax.errors import ConfigError
from lmjax.plan import topology

EIGHT_DEVICES = Path(__file__).parent / "eight_devices.py"


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(on_eight_devices: Callable[..., None], marks: str) -> None:
    on_eight_devices(EIGHT_DEVICES, "-m", marks)


def test_without_a_mesh_nothing_happens() -> None:
    x = jnp.ones((2, 3))
    assert current_mesh() is None
    assert constrain(x, "batch", None) is x
    assert gather({"w": x})["w"] is x


def mesh(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def test_named_axes_become_mesh_axes() -> None:
    every = mesh(**dict.fromkeys(AXES, 2))
    assert tuple(partition_spec(("batch", None, "heads", None), every)) == (
        SHARDING_RULES["batch"],
        None,
        "tensor",
        None,
    )
    assert tuple(partition_spec(("vocab", "embed"), every)) == ("tensor", ("fsdp", "context"))
    assert tuple(partition_spec(("vocab", "embed"), mesh(fsdp=2, data=2))) == (None, "fsdp")
    assert tuple(partition_spec(("batch", "time"), mesh(tensor=8))) == (None, None)
    assert {axis for rule in SHARDING_RULES.values() for axis in rule} == set(AXES)
    assert {axis for axes in LAYOUTS.values() for axis in axes} <= set(AXES)


def test_one_mesh_axis_serves_one_dimension() -> None:
    with pytest.raises(ConfigError, match=r"'heads' and 'mlp' .* are both sharded along mesh.tensor"):
        partition_spec(("heads", "embed", "mlp"), mesh())


def test_zig_zag_order_gives_every_device_an_early_and_a_late_chunk() -> None:
    assert time_order(16, 2).tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 4, 5, 6, 7, 8, 9, 10, 11]
    for context in (1, 2, 4):
        order_T = time_order(48, context)
        assert sorted(order_T) == list(range(48))
        work = (order_T + 1).reshape(context, -1).sum(axis=1)  # keys that a device's queries see
        assert np.all(work == work[0])


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs lmjax[tpu]")
def test_slices_lie_along_their_own_axis() -> None:
    devices = topology.devices(topology.parse("2xv5e-8"))
    laid_out = make_mesh(MeshConfig(layout="fsdp+tp", slices=2), devices).devices
    assert laid_out.shape == (2, 1, 1, 4, 1, 1, 2)
    for number, one_slice in enumerate(laid_out):
        assert {device.slice_index for device in one_slice.flat} == {number}
    with pytest.raises(ConfigError, match=r"the devices form 2 slices; set mesh\.slices=2"):
        make_mesh(MeshConfig(layout="fsdp"), devices)
