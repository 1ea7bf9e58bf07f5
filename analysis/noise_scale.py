"""The gradient noise scale: the batch beyond which more rows buy little (McCandlish et al. 2018, arXiv:1812.06162).

A run with `train.noise_scale` logs unbiased estimates of |G|^2 and tr(S) at each logged step: G the true gradient, S
the covariance of one row's. The simple noise scale is the quotient of their means, tr(S) / |G|^2; in the paper it lies
near the critical batch, at which training takes twice the fewest steps and twice the fewest tokens. It grows as the
loss falls, so it is given for parts of a run.
"""

from typing import NamedTuple

import numpy as np

from analysis.records import RunRecord, flatten

SIGNAL, TRACE = "optim/noise_signal", "optim/noise_trace"
FEWEST = 20
"""Logged steps in a part: a quotient of fewer noisy means says nothing."""


class NoiseScale(NamedTuple):
    """Of one part of a run, in tokens."""

    first_step: int
    last_step: int
    scale: float
    """NaN where |G|^2 is not above its own error."""
    stderr: float


def noise_scales(record: RunRecord, parts: int) -> list[NoiseScale]:
    """Of `parts` equal parts of the logged steps. Raises ValueError for a run that logged none, or too few."""
    rows = [row for row in record.history if isinstance(row.get(SIGNAL), float) and isinstance(row.get(TRACE), float)]
    if len(rows) < FEWEST * parts:
        raise ValueError(
            f"{record.name}: {len(rows)} steps tell of the noise scale, {FEWEST * parts} are needed for {parts} parts: "
            "train with --config.train.noise_scale=True --config.train.log_every=1"
        )
    seq_len = flatten(record.config)["data.seq_len"]
    found = []
    for part in np.array_split(np.arange(len(rows)), parts):
        signal, trace = (np.array([rows[index][key] for index in part]) for key in (SIGNAL, TRACE))
        scale, stderr = quotient(trace, signal)
        steps = rows[part[0]]["step"], rows[part[-1]]["step"]
        found.append(NoiseScale(*steps, scale * seq_len, stderr * seq_len))
    return found


def quotient(above: np.ndarray, below: np.ndarray, blocks: int = 10) -> tuple[float, float]:
    """(the quotient of two means, its standard error), by a jackknife over blocks of neighbours, which are correlated.

    NaN where the lower mean is not two of its own standard errors above 0.
    """
    groups = np.array_split(np.arange(len(above)), blocks)
    means = np.array([below[group].mean() for group in groups])
    if below.mean() < 2 * means.std(ddof=1) / np.sqrt(blocks):
        return float("nan"), float("nan")
    left = [np.setdiff1d(np.arange(len(above)), group) for group in groups]
    without = np.array([above[rest].mean() / below[rest].mean() for rest in left])
    stderr = np.sqrt((blocks - 1) / blocks * ((without - without.mean()) ** 2).sum())
    return float(above.mean() / below.mean()), float(stderr)
