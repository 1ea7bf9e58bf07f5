"""Metrics are (sum, weight) pairs until the host divides them.

Sums of sums are exact under gradient accumulation, ragged masks and any batch size; means of means are not.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Metrics = dict[str, tuple[Any, Any]]  # name -> (sum, weight), scalars


def finish(metrics: Metrics) -> dict[str, float]:
    """Divide on the host, in float64. A metric with no weight has no value and is left out."""
    host: Mapping[str, tuple[Any, Any]] = jax.device_get(metrics)
    return {name: float(np.float64(total) / np.float64(weight)) for name, (total, weight) in host.items() if weight}
