"""The table of chips."""

import pytest

from lmjax.devices import chips


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB300", 2500),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("TPU v3", 61.5),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5e", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7", 1153.5),
        ("TPU7x", 1153.5),
    ],
)
def test_peak_flops(kind: str, teraflops: float) -> None:
    assert chips.peak_flops(kind) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA RTX A1000", "NVIDIA T4", "TPU v9", ""])
def test_an_unknown_device_has_no_peak(kind: str) -> None:
    assert chips.peak_flops(kind) is None
