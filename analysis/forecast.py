"""Say beforehand what loss a run will reach, in a dated, hashed file; and score it when the run is done."""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from analysis.parametric import fit_parametric
from analysis.runs import Runs, naming
from analysis.uncertainty import prediction_interval, resample_pairs

# A run was forecast if its N and D are within this of the forecast's.
SAME_CELL = 0.02


@dataclass(frozen=True)
class Score:
    forecast: str
    predicted: float  # nats
    low: float
    high: float
    actual: float

    @property
    def inside(self) -> bool:
        return self.low <= self.actual <= self.high

    @property
    def relative_error(self) -> float:
        return self.predicted / self.actual - 1.0


def make_forecast(
    runs: Runs,
    params: float,
    tokens: float,
    *,
    level: float = 0.95,
    replicates: int = 4000,
    seed: int = 42,
    now: datetime | None = None,
) -> dict:
    """Loss of a run of N `params` on D `tokens` by approach 3, with a prediction interval, date and hash."""
    runs = runs.tuned()
    with naming(runs.source):
        fit = fit_parametric(*runs.points)
    surfaces = resample_pairs(*runs.points, fit, replicates=replicates, seed=seed)
    interval = prediction_interval(surfaces, fit, params, tokens, level=level, seed=seed)
    surface = fit.surface
    content = {
        "made": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
        "params": params,
        "tokens": tokens,
        "loss": float(surface.loss(params, tokens)),
        "low": interval.low,
        "high": interval.high,
        "level": level,
        "loss_name": runs.loss_name,
        "params_convention": runs.params_convention,
        "data_sha256": runs.sha256,
        "runs": len(runs.table),
        "surface": {name: float(getattr(surface, name)) for name in ("E", "A", "B", "alpha", "beta")},
        "agreeing": fit.agreeing,
        "replicates": replicates,
        "seed": seed,
    }
    return {**content, "sha256": _digest(content)}


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_forecast(path: Path) -> dict:
    """Raises ValueError when the file is not a forecast, or was changed after it was made."""
    try:
        forecast = json.loads(path.read_text())
        content = {key: value for key, value in forecast.items() if key != "sha256"}
        genuine = forecast["sha256"] == _digest(content)
    except (OSError, json.JSONDecodeError, KeyError, AttributeError):
        raise ValueError(f"{path}: not a forecast: name a file that `predict` wrote") from None
    if not genuine:
        raise ValueError(f"{path}: its hash does not match its content: it was edited after {forecast.get('made')}")
    return forecast


def score(path: Path, actual: float) -> Score:
    """Compare a forecast with the loss that came out, nats."""
    forecast = read_forecast(path)
    return Score(str(path), forecast["loss"], forecast["low"], forecast["high"], actual)


def actual_loss(forecast: dict, runs: Runs) -> float:
    """The mean loss of the runs at the forecast's (N, D). Raises ValueError when there is none."""
    off_params = np.abs(runs.column("params") / forecast["params"] - 1.0)
    off_tokens = np.abs(runs.column("tokens") / forecast["tokens"] - 1.0)
    same = (off_params < SAME_CELL) & (off_tokens < SAME_CELL)
    if not same.any():
        raise ValueError(
            f"{runs.source}: no run within {SAME_CELL:.0%} of N = {forecast['params']:.4g}, "
            f"D = {forecast['tokens']:.4g}: give its loss with --loss-value"
        )
    return float(runs.column("loss")[same].mean())
