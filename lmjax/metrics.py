"""Metrics are (sum, weight) pairs until the host divides them.

Sums of sums are exact under gradient accumulation, ragged masks and any batch size; means of means are not.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Metrics = dict[str, tuple[Any, Any]]
"""name -> (sum, weight), scalars. Inside a step a sum may be a tree of arrays, as `load` of a mixture of experts is
until `after_update` makes one number of it."""


def finish(metrics: Metrics) -> dict[str, Any]:
    """Divide on the host, in float64. A metric with no weight has no value and is left out.

    Metrics of runs that are stacked on a leading axis, [runs] for every sum and weight, give an array of values each,
    NaN for a run where the metric has no weight.
    """
    host: Mapping[str, tuple[Any, Any]] = jax.device_get(metrics)
    return {name: _quotient(total, weight) for name, (total, weight) in host.items() if np.any(weight)}


def _quotient(total: Any, weight: Any) -> Any:
    with np.errstate(invalid="ignore"):
        value = np.asarray(total, np.float64) / np.where(weight, weight, np.nan).astype(np.float64)
    return value if value.ndim else float(value)
