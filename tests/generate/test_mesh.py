"""Text generation on a mesh. jax fixes its devices when it starts, so it runs in a process of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(on_eight_devices: Callable[..., None], marks: str) -> None:
    on_eight_devices(Path(__file__).parent / "mesh_devices.py", "-m", marks)
