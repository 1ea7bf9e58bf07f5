"""Rebuild the gallery's figures from simulated runs: `python docs/gallery/build.py` from the root (about a minute).

The surface is that of Besiroglu et al. 2024; every run has 0.003 nats of seed noise. Files stay small: 64 colours.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from analysis.envelope import smooth  # noqa: E402
from analysis.estimates import Options  # noqa: E402
from analysis.repeats import effective_loss  # noqa: E402
from analysis.report import draw, save  # noqa: E402
from analysis.runs import Runs  # noqa: E402
from analysis.simulate import EPOCH, Faults, simulate, simulate_curves  # noqa: E402
from analysis.study import make_study  # noqa: E402

HERE = Path(__file__).resolve().parent
TARGET = 1e23
NOISE = 0.003
COLOURS = 64


def runs_of(table: pd.DataFrame, curves: pd.DataFrame) -> Runs:
    return Runs(table, curves, "simulated", "all", "6ND", "loss", "simulated" + "0" * 55)


def isoflop_runs() -> Runs:
    """63 runs within 4x of the optimum of nine budgets."""
    sweep = simulate(EPOCH, Faults(noise_sd=NOISE), seed=1)
    table = pd.DataFrame(
        {"params": sweep.params, "tokens": sweep.tokens, "flops": sweep.budget, "loss": sweep.loss[0]}
    ).assign(run=[f"run{i}" for i in range(len(sweep.budget))])
    return runs_of(table, pd.DataFrame(columns=["run", "step", "tokens", "flops", "loss"]))


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
    """Eight sizes on few unique tokens, up to 40 epochs, tuned over learning rates; R_D* = 15.4 and R_N* = 5.3."""
    rng = np.random.default_rng(3)
    params = np.repeat(np.geomspace(5e7, 3e9, 6), 30)
    unique = np.tile(np.repeat([5e8, 2e9, 1e10], 10), 6)
    tokens = unique * np.tile(np.repeat([1, 40], 5), 18)
    rate = np.tile(np.geomspace(0.25, 4.0, 5), 36)
    best = 0.3 * params**-0.23 * tokens**0.05
    loss = effective_loss(EPOCH, params, tokens, unique, 15.4, 5.3) + 0.02 * np.log(rate) ** 2
    table = pd.DataFrame({"params": params, "tokens": tokens, "unique_tokens": unique, "flops": 6 * params * tokens})
    table = table.assign(loss=loss + rng.normal(0, NOISE, len(loss)), learning_rate=best * rate)
    return runs_of(table, pd.DataFrame(columns=["run", "step", "tokens", "flops", "loss"]))


def main() -> None:
    wanted = {
        "training-curves": curve_runs(),
        "hyperparameters": repeated_runs(),
        "repeats": repeated_runs_at_best_rate(),
        None: isoflop_runs(),
    }
    for only, runs in wanted.items():
        drawings, _ = draw(make_study(runs, Options(TARGET, replicates=400)))
        for name, drawing in drawings.items():
            if only in (None, name) and not (only is None and name in wanted):
                save(drawing, HERE / name, runs)
                shrink(HERE / name)


def repeated_runs_at_best_rate() -> Runs:
    runs = repeated_runs()
    best = runs.table.loc[runs.table.groupby(["params", "tokens", "unique_tokens"])["loss"].idxmin()]
    return runs_of(best.drop(columns="learning_rate").reset_index(drop=True), runs.curves)


def shrink(stem: Path) -> None:
    """Keep the picture alone, in a small palette."""
    image = Image.open(stem.with_suffix(".png")).convert("RGB")
    image.quantize(COLOURS).save(stem.with_suffix(".png"), optimize=True)
    stem.with_suffix(".pdf").unlink()
    stem.with_suffix(".csv").unlink()


if __name__ == "__main__":
    main()
