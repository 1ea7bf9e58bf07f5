"""Pipelines. jax fixes its devices when it starts, so what needs several of them runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmjax.models.config import ModelConfig, dominant

TESTS = Path(__file__).parents[1]


def run_on_eight_devices(*arguments: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "--durations=5", str(TESTS / "pipeline_devices.py"), *arguments],
        cwd=TESTS.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_on_eight_devices() -> None:
    run_on_eight_devices()


@pytest.mark.slow
def test_products_on_eight_devices() -> None:
    run_on_eight_devices("-m", "slow")


def test_the_dominant_segment_has_most_layers() -> None:
    cfg = ModelConfig(layers=7, pattern=("local", "local", "global"), window=3)
    assert [len(period) * repeats for period, repeats in cfg.segments] == [6, 1]
    assert dominant(cfg.segments) == 0
