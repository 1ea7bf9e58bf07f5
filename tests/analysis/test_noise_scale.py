"""The gradient noise scale of runs whose truth is known."""

import numpy as np
import pytest

from analysis.noise_scale import noise_scales, quotient
from analysis.records import RunRecord


def run(signal: np.ndarray, trace: np.ndarray) -> RunRecord:
    rows = ({"step": 1 + step, "optim/noise_signal": float(s), "optim/noise_trace": float(t)}
            for step, (s, t) in enumerate(zip(signal, trace, strict=True)))  # fmt: skip
    return RunRecord("run", {"data": {"seq_len": 128}}, {}, tuple(rows))


def test_the_interval_holds_the_truth():
    """Of 200 simulated runs nine in ten within 1.645 standard errors of the quotient of the means."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        signal, trace = rng.normal(0.5, 1.0, 400), rng.gamma(4.0, 0.5, 400)
        value, stderr = quotient(trace, signal)
        hits += abs(value - 2.0 / 0.5) < 1.645 * stderr
    assert 165 <= hits <= 195


def test_parts_tell_how_it_grows_in_tokens():
    rng = np.random.default_rng(1)
    signal = np.where(np.arange(400) < 200, 1.0, 0.25) * rng.gamma(9.0, 1 / 9, 400)
    first, second = noise_scales(run(signal, rng.gamma(9.0, 2 / 9, 400)), 2)
    assert (first.first_step, first.last_step, second.last_step) == (1, 200, 400)
    assert first.scale == pytest.approx(2 * 128, rel=0.1) and second.scale == pytest.approx(8 * 128, rel=0.1)
    assert 0 < first.stderr < 0.1 * first.scale


def test_noise_alone_has_no_scale():
    rng = np.random.default_rng(2)
    (part,) = noise_scales(run(rng.normal(0.0, 1.0, 100), rng.gamma(4.0, 0.5, 100)), 1)
    assert np.isnan(part.scale)


def test_too_few_steps_are_told():
    with pytest.raises(ValueError, match="run: 30 steps tell of the noise scale, 40 are needed for 2 parts"):
        noise_scales(run(np.ones(30), np.ones(30)), 2)
