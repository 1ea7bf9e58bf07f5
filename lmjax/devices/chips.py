"""What an accelerator can do and what it costs: the one table behind MFU and `lmjax plan`.

Data sheets change rarely, prices do: PRICES_FROM says when and where they were read. Edit the table for another region,
a reservation or a discount; nothing else knows a price.
"""

import re
from typing import NamedTuple

PRICES_FROM = "on-demand list prices of Google Cloud in US regions, as in SkyPilot's catalog v8, read 21 November 2026"


class Chip(NamedTuple):
    """One JAX device. What a vendor does not publish is None, and whoever needs it says so."""

    flops: float
    """Dense bf16 FLOP/s: fp32 accumulation, no sparsity."""
    hbm: float | None = None
    """Bytes of memory that a program may use: what XLA states, a little less than the data sheet."""
    hbm_bandwidth: float | None = None
    """Bytes/s between memory and chip."""
    link: float | None = None
    """Bytes/s one way over one of the links of the torus inside a slice (ICI)."""
    dcn: float | None = None
    """Bytes/s one way between slices, a device's share of its host's network."""
    dollars: float | None = None
    """The price of one device for one hour."""


GIB = 2**30

# By the words of `jax.Device.device_kind` that tell a chip apart; the first that matches counts.
CHIPS: dict[str, Chip] = {
    "GB300": Chip(2.5e15),  # NVIDIA GB300 NVL72 data sheet: 5000 with sparsity
    "B300": Chip(2.25e15),  # NVIDIA HGX B300 data sheet: 4500 with sparsity
    "GB200": Chip(2.5e15),  # NVIDIA GB200 NVL72 data sheet: 5000 with sparsity
    "B200": Chip(2.25e15),  # NVIDIA HGX B200 data sheet: 4500 with sparsity
    "H200 NVL": Chip(8.355e14),  # NVIDIA H200 data sheet: 1671 with sparsity
    "H200": Chip(9.895e14),  # NVIDIA H200 data sheet, SXM: 1979 with sparsity
    "GH200": Chip(9.895e14),  # NVIDIA GH200 data sheet: 1979 with sparsity
    "H100 NVL": Chip(8.355e14),  # NVIDIA H100 data sheet: 1671 with sparsity
    "H100 PCIe": Chip(7.565e14),  # NVIDIA H100 data sheet: 1513 with sparsity
    "H100": Chip(9.895e14),  # NVIDIA H100 data sheet, SXM: 1979 with sparsity
    "A100": Chip(3.12e14),  # NVIDIA A100 data sheet, SXM and PCIe
    "L40S": Chip(3.62e14),  # NVIDIA L40S data sheet: 733 with sparsity
    "L40": Chip(1.81e14),  # NVIDIA L40 data sheet: 362 with sparsity
    "L4": Chip(1.21e14),  # NVIDIA L4 data sheet: 242 with sparsity
    "A10G": Chip(7.0e13),  # NVIDIA A10G data sheet
    "A10": Chip(1.25e14),  # NVIDIA A10 data sheet: 250 with sparsity
    "RTX 6000 Ada": Chip(3.64e14),  # NVIDIA RTX 6000 Ada data sheet: 728 with sparsity
    "RTX A6000": Chip(1.548e14),  # NVIDIA GA102 whitepaper
    "RTX 4090": Chip(1.652e14),  # NVIDIA Ada whitepaper, appendix A, fp32 accumulation
    "RTX 3090": Chip(7.1e13),  # NVIDIA GA102 whitepaper, fp32 accumulation
    # Google Cloud TPU documentation, the page of each version. A link's rate is the page's bidirectional bandwidth per
    # chip over its number of ports and two directions; the network between slices is that of a host or pod over chips.
    "TPU v2": Chip(2.25e13),  # 45 per chip, a device is one of its two cores
    "TPU v3": Chip(6.15e13),  # 123 per chip, a device is one of its two cores
    "TPU v4 lite": Chip(1.38e14),
    "TPU v4": Chip(2.75e14, 31.75 * GIB, 1.2e12, 50e9, None, 3.22),
    "TPU v5 lite": Chip(1.97e14, 15.75 * GIB, 8.19e11, 50e9, 3.125e9, 1.20),  # v5e
    "TPU v5": Chip(4.59e14, 95.74 * GIB, 2.765e12, 100e9, 6.25e9, 4.20),  # v5p
    "TPU v6 lite": Chip(9.18e14, 31.25 * GIB, 1.6e12, 100e9, 12.5e9, 2.70),  # v6e, Trillium
    "TPU7x": Chip(1.1535e15, 94.75 * GIB, 3.69e12, 100e9, 6.25e9),  # Ironwood: a device is one of its two chiplets
}

# What jax calls some of them as well (jax's pallas/mosaic/tpu_info.py and mesh_utils.py).
OTHER_NAMES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite", "TPU7": "TPU7x"}


def chip(device_kind: str) -> Chip | None:
    """What we know of a device, or None where we know nothing (a CPU)."""
    device_kind = OTHER_NAMES.get(device_kind, device_kind)
    return next((chip for name, chip in CHIPS.items() if re.search(rf"\b{name}\b", device_kind)), None)


def gpus(name: str) -> tuple[str, int] | None:
    """`("H100", 8)` of `H100-8`; None for what is not a number of GPUs that stand in the table."""
    kind, _, number = name.rpartition("-")
    return (kind, int(number)) if kind in CHIPS and number.isdigit() and int(number) > 0 else None


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one device, or None where we know no figure: then there is no MFU."""
    known = chip(device_kind)
    return None if known is None else known.flops
