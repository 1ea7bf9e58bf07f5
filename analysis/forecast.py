"""Say beforehand what loss a run will reach, in a dated, hashed file; and score it when the run is done."""

import hashlib
import json
from collections.abc import Mapping
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
    return seal(content, now)


def seal(content: dict, now: datetime | None = None) -> dict:
    """The forecast with its date (`now`, UTC, by default the present) and the hash of all of it."""
    dated = {"made": (now or datetime.now(UTC)).isoformat(timespec="seconds"), **content}
    return {**dated, "sha256": _digest(dated)}


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
    return _score(str(path), read_forecast(path), actual)


def _score(name: str, forecast: dict, actual: float) -> Score:
    return Score(name, forecast["loss"], forecast["low"], forecast["high"], actual)


def actual_loss(forecast: dict, runs: Runs) -> float:
    """The mean loss of the runs at the forecast's (N, D). Raises ValueError when there is none."""
    losses = _losses_at(forecast, *runs.points)
    if not len(losses):
        raise ValueError(
            f"{runs.source}: no run within {SAME_CELL:.0%} of N = {forecast['params']:.4g}, "
            f"D = {forecast['tokens']:.4g}: give its loss with --loss-value"
        )
    return float(losses.mean())


def _losses_at(forecast: dict, params, tokens, loss) -> np.ndarray:
    off_params, off_tokens = np.abs(params / forecast["params"] - 1.0), np.abs(tokens / forecast["tokens"] - 1.0)
    return loss[(off_params < SAME_CELL) & (off_tokens < SAME_CELL)]


@dataclass(frozen=True)
class Calibration:
    """What forecasts are worth: those whose runs have ended, by name; the others wait."""

    scores: tuple[Score, ...]
    waiting: tuple[str, ...]

    @property
    def inside(self) -> float:
        """The share inside their intervals; a run that diverged is outside. NaN before any has ended."""
        return float(np.mean([score.inside for score in self.scores])) if self.scores else np.nan

    @property
    def mean_error(self) -> float:
        """Mean |predicted / actual - 1| of the runs that ended with a loss; NaN before any has."""
        errors = [abs(score.relative_error) for score in self.scores if np.isfinite(score.actual)]
        return float(np.mean(errors)) if errors else np.nan


def score_forecasts(forecasts: Mapping[str, dict], params, tokens, loss) -> Calibration:
    """Compare forecasts, by name, with the runs that ended at their (N, D), each (runs,); losses in nats or NaN."""
    params, tokens, loss = (np.asarray(x, dtype=np.float64) for x in (params, tokens, loss))
    found = {name: _losses_at(forecast, params, tokens, loss) for name, forecast in forecasts.items()}
    return Calibration(
        tuple(_score(name, forecasts[name], float(losses.mean())) for name, losses in found.items() if len(losses)),
        tuple(name for name, losses in found.items() if not len(losses)),
    )
