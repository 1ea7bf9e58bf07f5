"""Figures that need more than N, D, C and a loss: stages of correction, downstream errors, learning rate and batch."""

import numpy as np
import pandas as pd
import pytest

from analysis.estimates import Options
from analysis.figures.style import NotApplicableError
from analysis.report import draw_one, estimates_table, recommended_run
from analysis.runs import load_runs
from analysis.simulate import EPOCH, Faults, simulate
from analysis.study import make_study

OPTIONS = Options(target=1e23, replicates=100)
NOISE = 0.001
FAULTS = {"first": Faults(NOISE, mistuning=0.03, wrong_horizon=0.05), "tuned": Faults(NOISE)}


def sweep_table(faults: Faults) -> pd.DataFrame:
    sweep = simulate(EPOCH, faults, seed=3)
    return pd.DataFrame({"params": sweep.params, "tokens": sweep.tokens, "flops": sweep.budget, "loss": sweep.loss[0]})


def study_of(tmp_path, table: pd.DataFrame):
    table.to_csv(tmp_path / "runs.csv", index=False)
    return make_study(load_runs(tmp_path / "runs.csv"), OPTIONS)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """Two stages of a sweep, with downstream errors that follow the loss exactly."""
    parts = [sweep_table(faults).assign(stage=name) for name, faults in FAULTS.items()]
    table = pd.concat(parts).assign(error=lambda t: 0.86 - 2.4 * np.exp(-0.85 * t["loss"]))
    return study_of(tmp_path_factory.mktemp("staged"), table)


def test_exponents_by_stage_show_what_a_correction_does(staged):
    rows = draw_one("stages", staged).data.set_index(["stage", "method"])
    assert list(rows.index.levels[0]) == ["first", "tuned"]
    for method in ("approach 3 (Huber)", "approach 2 (parabola)"):
        wrong, right = rows.loc[("first", method)], rows.loc[("tuned", method)]
        assert right["low"] < EPOCH.params_exponent < right["high"]
        assert abs(wrong["exponent"] - EPOCH.params_exponent) > 0.02


def test_the_laws_are_those_of_the_last_stage(staged):
    assert len(staged.runs.table) == 63 and list(staged.runs.stages) == ["first", "tuned"]
    assert staged.huber.surface.params_exponent == pytest.approx(EPOCH.params_exponent, abs=0.01)
    assert any("those of the last, tuned" in note for note in staged.warnings)


def test_downstream_error_follows_the_loss_to_the_target(staged):
    data = draw_one("downstream-error", staged).data
    loss, error = data.loc[data["kind"] == "fit", ["loss", "error"]].to_numpy().T
    assert error == pytest.approx(0.86 - 2.4 * np.exp(-0.85 * loss), abs=1e-4)
    assert loss.min() == pytest.approx(EPOCH.frontier_loss(1e23), abs=0.02)
    assert (data["kind"] == "run").sum() == 63


def test_errors_in_percent_are_not_drawn(tmp_path):
    study = study_of(tmp_path, sweep_table(Faults()).assign(error=lambda t: 20.0 * t["loss"]))
    with pytest.raises(NotApplicableError, match="shares between 0 and 1"):
        draw_one("downstream-error", study)


# Learning rate and batch ------------------------------------------------------------------------------------------


def best_rate(params, tokens):
    return 7e-4 * (params / 4e8) ** -0.25 * (tokens / 1e10) ** 0.05


def best_batch(tokens):
    return 5e5 * (tokens / 1e10) ** 0.38


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Seven learning rates by five batches by two seeds at eight (N, D)."""
    cells = [(n, n * ratio) for n in np.geomspace(5e7, 3e9, 4) for ratio in (10.0, 80.0)]
    tried = [
        (*cell, x, y, s) for cell in cells for x in np.linspace(-1.5, 1.5, 7) for y in range(-2, 3) for s in (0, 1)
    ]
    params, tokens, x, y, seed = np.array(tried).T
    noise = np.random.default_rng(1).normal(0, NOISE, len(x))
    columns = {"params": params, "tokens": tokens, "seed": seed, "learning_rate": best_rate(params, tokens) * np.exp(x)}
    table = pd.DataFrame(columns).assign(batch_tokens=best_batch(tokens) * np.exp(y))
    table["loss"] = EPOCH.loss(params, tokens) + 0.02 * x**2 + 0.01 * y**2 + noise
    return study_of(tmp_path_factory.mktemp("tuned"), table)


def test_only_the_best_settings_are_fitted(tuned):
    assert len(tuned.trials.table) == 8 * 7 * 5 * 2 and len(tuned.runs.table) == 16
    assert tuned.huber.surface.params_exponent == pytest.approx(EPOCH.params_exponent, abs=0.03)


def test_settings_at_the_target_have_intervals_that_hold_the_truth(tuned):
    row = estimates_table(tuned).iloc[0]
    truth = {"learning_rate": best_rate(row["params"], row["tokens"]), "batch_tokens": best_batch(row["tokens"])}
    for name, value in truth.items():
        assert row[f"{name}_low"] <= value * 1.001 and value <= row[f"{name}_high"] * 1.001
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"] and row[name] == pytest.approx(value, rel=0.3)


def test_the_next_run_is_set_by_the_laws(tuned):
    config, row = recommended_run(tuned), estimates_table(tuned).iloc[0]
    assert config["optimizer.learning_rate"] == pytest.approx(row["learning_rate"], rel=0.01)
    batch = config["train.batch"] * config["data.seq_len"]
    assert abs(np.log2(batch / row["batch_tokens"])) <= 0.5  # the nearest power of two


def test_heat_maps_show_every_run_of_their_cells(tuned):
    data = draw_one("learning-rate-batch", tuned).data
    assert len(data) == 6 * 7 * 5 * 2
    for _, cell in data.groupby(["params", "tokens"]):
        best = cell.groupby(["learning_rate", "batch_tokens"])["loss"].mean().idxmin()
        assert best[0] == pytest.approx(best_rate(cell["params"].iloc[0], cell["tokens"].iloc[0]), rel=0.7)
        assert best[1] == pytest.approx(best_batch(cell["tokens"].iloc[0]), rel=0.7)
    assert set(draw_one("hyperparameters", tuned).data["setting"]) == {"learning_rate", "batch_tokens"}
