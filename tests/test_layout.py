"""Meshes. jax fixes its devices when it starts, so what needs eight of them runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from lmjax.layout import RULES, constrain, current_mesh, gather, partition
from lmjax.weights import Weight

EIGHT_DEVICES = Path(__file__).parent / "eight_devices.py"


def test_on_eight_devices() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--durations=5", str(EIGHT_DEVICES)],
        cwd=EIGHT_DEVICES.parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_without_a_mesh_nothing_happens() -> None:
    x = jnp.ones((2, 3))
    assert current_mesh() is None
    assert constrain(x, "batch", None) is x
    assert gather({"w": x}, {"w": Weight("embed -> mlp", sizes=(2, 3))})["w"] is x


def test_named_axes_become_mesh_axes() -> None:
    assert tuple(partition(("batch", None, "heads", None))) == (("data", "fsdp"), None, "tensor", None)
    assert tuple(partition(("vocab", "embed"))) == (None, "fsdp")
    assert tuple(partition(("embed", "mlp"), without="fsdp")) == (None, "tensor")
    assert {axis for rule in RULES.values() for axis in ([rule] if isinstance(rule, str) else rule)} == {
        "data",
        "fsdp",
        "tensor",
    }


def test_one_mesh_axis_serves_one_dimension() -> None:
    with pytest.raises(AssertionError, match="tensor"):
        partition(("heads", "mlp"))
