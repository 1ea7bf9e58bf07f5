"""Rebuild the gallery's figures from simulated runs: `python docs/gallery/build.py` from the root (about a minute).

The surface is that of Besiroglu et al. 2024; every run has 0.003 nats of seed noise. Files stay small: 64 colours.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from analysis.envelope import smooth  # noqa: E402
from analysis.estimates import Options  # noqa: E402
from analysis.figures.style import Drawing  # noqa: E402
from analysis.repeats import effective_loss  # noqa: E402
from analysis.report import draw, draw_one, save  # noqa: E402
from analysis.runs import CURVE_COLUMNS, Runs  # noqa: E402
from analysis.simulate import EPOCH, Faults, simulate, simulate_curves  # noqa: E402
from analysis.study import make_study  # noqa: E402

HERE = Path(__file__).resolve().parent
OPTIONS = Options(target=1e23, replicates=400)
NOISE = 0.003
COLOURS = 64


def runs_of(table: pd.DataFrame, curves: pd.DataFrame) -> Runs:
    return Runs(table, curves, "simulated", "all", "6ND", "loss", "simulated" + "0" * 55)


def isoflop_runs(faults: Faults | None = None) -> Runs:
    """63 runs within 4x of the optimum of nine budgets, with downstream errors that follow the loss."""
    sweep, rng = simulate(EPOCH, faults or Faults(noise_sd=NOISE), seed=1), np.random.default_rng(7)
    loss = sweep.loss[0]
    error = 0.86 - 2.4 * np.exp(-0.85 * loss) + rng.normal(0, 0.004, len(loss))
    table = pd.DataFrame(
        {"params": sweep.params, "tokens": sweep.tokens, "flops": sweep.budget, "loss": loss, "error": error}
    ).assign(run=[f"run{i}" for i in range(len(sweep.budget))])
    return runs_of(table, pd.DataFrame(columns=CURVE_COLUMNS))


def staged_runs() -> Runs:
    """The same sweep with its faults removed one after the other."""
    faults = {
        "as first run": Faults(NOISE, mistuning=0.02, wrong_horizon=0.05),
        "own schedules": Faults(NOISE, mistuning=0.02),
        "tuned at each size": Faults(NOISE),
    }
    stages = {name: isoflop_runs(fault) for name, fault in faults.items()}
    return replace(list(stages.values())[-1], stages=stages)


def curve_runs() -> Runs:
    """14 sizes trained for 300 tokens per parameter, with their smoothed curves."""
    sizes = np.geomspace(3e7, 1e10, 14)
    rng = np.random.default_rng(2)
    curves = pd.DataFrame(simulate_curves(EPOCH, sizes, sizes * 300, noise_sd=0.01, seed=2))
    curves["loss"] += np.repeat(rng.normal(0, NOISE, len(sizes)), 200)
    curves["loss"] = curves.groupby("run")["loss"].transform(lambda loss: smooth(loss.to_numpy()))
    curves["run"] = "run" + curves["run"].astype(str)
    ends = curves.groupby("run").nth([30, 60, 90, 120, 150, 180, -1])
    table = ends.assign(params=ends["run"].str[3:].astype(int).map(lambda i: sizes[i]), trunk=ends["run"])
    table = table.assign(run=table["run"].where(table["step"] == 200, table["run"] + "@" + table["step"].astype(str)))
    return runs_of(table.drop(columns="step").reset_index(drop=True), curves)


def repeated_runs() -> Runs:
    """Six sizes on few unique tokens, for one epoch and for forty; R_D* = 15.4 and R_N* = 5.3."""
    params = np.repeat(np.geomspace(5e7, 3e9, 6), 6)
    unique = np.tile([5e8, 2e9, 1e10], 12)
    tokens = unique * np.tile(np.repeat([1, 40], 3), 6)
    rng = np.random.default_rng(3)
    loss = effective_loss(EPOCH, params, tokens, unique, 15.4, 5.3) + rng.normal(0, NOISE, len(params))
    columns = {"params": params, "tokens": tokens, "unique_tokens": unique, "flops": 6 * params * tokens, "loss": loss}
    return runs_of(pd.DataFrame(columns), pd.DataFrame(columns=CURVE_COLUMNS))


def tuning_runs() -> Runs:
    """Seven learning rates by six batches at twelve (N, D), about optima that follow power laws."""
    sizes = np.repeat(np.geomspace(5e7, 3e9, 4), 3)
    cells = [(n, n * ratio) for n, ratio in zip(sizes, np.tile([10.0, 40.0, 160.0], 4), strict=True)]
    tried = [(n, d, x, y) for n, d in cells for x in np.linspace(-1.5, 1.5, 7) for y in np.linspace(-2, 2, 6)]
    params, tokens, off_rate, off_batch = np.array(tried).T
    rng = np.random.default_rng(4)
    # Grids are centred on a guess, not on the optimum; a larger batch wants a larger rate.
    rate, batch = 6e-4 * np.exp(off_rate) * (params / 4e8) ** -0.2, 4e5 * np.exp(off_batch) * (tokens / 1e10) ** 0.4
    x = np.log(rate / (7e-4 * (params / 4e8) ** -0.25 * (tokens / 1e10) ** 0.05))
    y = np.log(batch / (5e5 * (tokens / 1e10) ** 0.38))
    loss = EPOCH.loss(params, tokens) + 0.02 * (x - 0.3 * y) ** 2 + 0.008 * y**2 + rng.normal(0, NOISE / 3, len(x))
    columns = {"params": params, "tokens": tokens, "flops": 6 * params * tokens, "loss": loss}
    table = pd.DataFrame(columns).assign(learning_rate=rate, batch_tokens=batch)
    return runs_of(table, pd.DataFrame(columns=CURVE_COLUMNS))


def main() -> None:
    wanted = {
        "training-curves": curve_runs(),
        "hyperparameters": tuning_runs(),
        "learning-rate-batch": tuning_runs(),
        "repeats": repeated_runs(),
        "stages": staged_runs(),
    }
    for name, runs in wanted.items():
        publish(name, draw_one(name, make_study(runs, OPTIONS)), runs)
    runs = isoflop_runs()
    drawings, _ = draw(make_study(runs, OPTIONS))
    for name in drawings.keys() - wanted.keys():
        publish(name, drawings[name], runs)


def publish(name: str, drawing: Drawing, runs: Runs) -> None:
    """Keep the picture alone, in a small palette."""
    stem = HERE / name
    save(drawing, stem, runs)
    image = Image.open(stem.with_suffix(".png")).convert("RGB")
    image.quantize(COLOURS).save(stem.with_suffix(".png"), optimize=True)
    stem.with_suffix(".pdf").unlink()
    stem.with_suffix(".csv").unlink()


if __name__ == "__main__":
    main()
