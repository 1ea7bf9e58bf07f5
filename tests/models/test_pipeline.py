"""Pipelines. jax fixes its devices when it starts, so what needs several of them runs in a process of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lmjax.models.config import ModelConfig, dominant

PIPELINE_DEVICES = Path(__file__).parent / "pipeline_devices.py"


def test_on_eight_devices(on_eight_devices: Callable[..., None]) -> None:
    on_eight_devices(PIPELINE_DEVICES)


@pytest.mark.slow
def test_products_on_eight_devices(on_eight_devices: Callable[..., None]) -> None:
    on_eight_devices(PIPELINE_DEVICES, "-m", "slow")


def test_the_dominant_segment_has_most_layers() -> None:
    cfg = ModelConfig(layers=7, pattern=("local", "local", "global"), window=3)
    assert [len(period) * repeats for period, repeats in cfg.segments] == [6, 1]
    assert dominant(cfg.segments) == 0
