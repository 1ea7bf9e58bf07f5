"""The planner: better than the usual grid for a fraction of the money, by delta method and by simulation."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.cells import overrides
from analysis.design import Candidates, choose_cells, loss_gradient, next_cells, standard_errors
from analysis.parametric import fit_replicates
from analysis.simulate import EPOCH, Faults, isoflop_grid, simulate
from lmjax.models.shapes import nearest_shape, shapes

ROOT = Path(__file__).resolve().parents[2]
TARGET, NOISE = 1e24, 0.005
GRID = isoflop_grid(EPOCH)[1:]
COST = float(np.sum(6 * GRID[0] * GRID[1]))
CASES = [((0.5, 1000.0), 0.10), ((2.0, 200.0), 0.25)]


def planned(ratios, share, goal="optimum"):
    sizes = [shape.params for shape in shapes(GRID[0].min(), GRID[0].max())]
    candidates = Candidates.of(sizes, ratios, share * COST)
    return choose_cells(EPOCH, candidates, budget=share * COST, target=TARGET, noise_sd=NOISE, goal=goal)


@pytest.mark.parametrize(("ratios", "share"), CASES)
@pytest.mark.parametrize("goal", ["optimum", "exponent"])
def test_beats_the_63_cell_grid_for_a_fraction_of_its_compute(ratios, share, goal):
    design = planned(ratios, share, goal)
    assert design.spent <= share * COST and len(design.params) <= 40 < len(GRID[0])
    grid_exponent, grid_size = standard_errors(EPOCH, *GRID, TARGET, NOISE)
    assert design.exponent_se < grid_exponent
    if goal == "optimum":
        assert design.log_params_se < grid_size
    used = design.tokens / design.params
    assert used.min() >= 0.999 * ratios[0] and used.max() <= 1.001 * ratios[1]


@pytest.mark.parametrize(("ratios", "share"), CASES)
def test_simulated_sweeps_agree_that_it_beats_the_grid(ratios, share):
    """Real fits of noisy losses; the hold-out is paid for and not fitted."""
    design = planned(ratios, share)

    def spread(params, tokens):
        noise = np.random.default_rng(0).normal(0, NOISE, (400, len(params)))
        log_loss = np.log(EPOCH.loss(params, tokens) + noise)
        # A wide corner: least squares, as the delta method supposes.
        surfaces = fit_replicates(params, tokens, log_loss, EPOCH, delta=1.0)
        return surfaces.params_exponent.std()

    assert spread(design.params, design.tokens) < spread(*GRID)


def test_the_delta_method_predicts_the_simulated_spread():
    noise = np.random.default_rng(0).normal(0, 0.002, (500, len(GRID[0])))
    surfaces = fit_replicates(*GRID, np.log(EPOCH.loss(*GRID) + noise), EPOCH, delta=1.0)
    promised = standard_errors(EPOCH, *GRID, TARGET, 0.002)
    assert surfaces.params_exponent.std() == pytest.approx(promised[0], rel=0.12)
    assert np.log(surfaces.optimum(TARGET)[0]).std() == pytest.approx(promised[1], rel=0.12)


def test_cells_that_tell_nothing_apart_leave_everything_open():
    """However linear algebra rounds: two sizes, without noise beside which what is known beforehand would count."""
    n, d = (x.ravel() for x in np.meshgrid([1e8, 1e9], np.geomspace(1e9, 1e11, 5)))
    assert standard_errors(EPOCH, n, d, TARGET, 1e-9) == (np.inf, np.inf)
    assert np.isfinite(standard_errors(EPOCH, n, d, TARGET, NOISE)).all()


def test_a_small_choice_is_the_best_of_all():
    """Six of ten cells, against every combination."""
    params = np.geomspace(1e8, 1e10, 10)
    candidates = Candidates(params, 20 * params[::-1])
    design = choose_cells(EPOCH, candidates, budget=1e30, target=TARGET, most=6, goal="exponent")
    held = np.flatnonzero(params == design.hold_out[0])[0]
    rest = [i for i in range(10) if i != held]
    gradients = loss_gradient(EPOCH, params, candidates.tokens) / 0.005
    best = min(_exponent_variance(gradients[list(chosen)]) for chosen in itertools.combinations(rest, 6))
    chosen = [int(np.flatnonzero(params == n)[0]) for n in design.params]
    assert _exponent_variance(gradients[chosen]) == pytest.approx(best, rel=0.05)


def _exponent_variance(gradients):
    from analysis.design import PRIOR_SD, exponent_gradient

    wanted = exponent_gradient(EPOCH)
    return float(wanted @ np.linalg.solve(np.diag(PRIOR_SD**-2.0) + gradients.T @ gradients, wanted))


def test_the_hold_out_is_extreme_and_not_fitted():
    design = planned((2.0, 200.0), 0.25)
    params, tokens = design.hold_out
    assert tokens / params == pytest.approx(200.0)
    assert not np.any((design.params == params) & (design.tokens == tokens))
    fitted = float(np.sum(6 * design.params * design.tokens))
    assert design.spent == pytest.approx(fitted + 6 * params * tokens)


def test_a_budget_too_small_is_refused():
    with pytest.raises(ValueError, match="raise --budget"):
        choose_cells(EPOCH, Candidates.of([1e8, 1e9], (2, 200), 1e18), budget=1e18, target=TARGET)


def test_the_next_cell_lowers_the_variance_most_for_its_price():
    params, tokens = np.array([(n, n * ratio) for n in (2e7, 1e8, 4e8) for ratio in (5.0, 80.0)]).T
    candidates = Candidates.of(np.geomspace(1e7, 1e10, 12), (2.0, 200.0), 1e21, steps=7)
    cells = next_cells(EPOCH, params, tokens, candidates, target=TARGET, noise_sd=NOISE)
    chosen = float(cells.params[0]), float(cells.tokens[0])

    def gain_per_flop(cell):
        after = standard_errors(EPOCH, np.append(params, cell[0]), np.append(tokens, cell[1]), TARGET, NOISE)[1]
        before = standard_errors(EPOCH, params, tokens, TARGET, NOISE)[1]
        gain = before**2 - after**2
        return gain / (6 * cell[0] * cell[1]) if gain >= 0.05 * before**2 else 0.0

    best = max(zip(candidates.params, candidates.tokens, strict=True), key=gain_per_flop)
    assert gain_per_flop(chosen) == pytest.approx(gain_per_flop(best), rel=1e-3)


def test_the_next_command_stops_or_names_a_cell(tmp_path, capsys):
    sweep = simulate(EPOCH, Faults(noise_sd=0.003), seed=2)
    columns = {"params": sweep.params, "tokens": sweep.tokens, "loss": sweep.loss[0]}
    pd.DataFrame(columns).to_csv(tmp_path / "runs.csv", index=False)
    flags = [f"--runs={tmp_path / 'runs.csv'}", "--target=1e24", "--largest=1e20", f"--out={tmp_path / 'next.json'}"]
    assert main(["next", *flags, "--tolerance=0.5"]) == 0
    assert "stop: " in capsys.readouterr().out and not (tmp_path / "next.json").exists()
    assert main(["next", *flags, "--tolerance=0.001"]) == 0
    (cell,) = json.loads((tmp_path / "next.json").read_text())
    assert set(cell) == set(overrides(nearest_shape(1e8), 2e9))
    assert "go on: " in capsys.readouterr().out


def test_the_next_command_names_what_it_left_out_and_refuses_too_few_runs(tmp_path, capsys):
    sweep = simulate(EPOCH, Faults(noise_sd=0.003), seed=2)
    table = pd.DataFrame({"params": sweep.params, "tokens": sweep.tokens, "loss": sweep.loss[0]})
    table["run"] = [f"run{i}" for i in range(63)]
    table.loc[40, "loss"] += 0.5
    flags = [f"--runs={tmp_path / 'runs.csv'}", "--target=1e24", "--largest=1e20", f"--out={tmp_path / 'next.json'}"]
    table.to_csv(tmp_path / "runs.csv", index=False)
    assert main(["next", *flags, "--tolerance=0.5"]) == 0
    assert "left out, far above the others: run40\n" in capsys.readouterr().out
    table[:4].to_csv(tmp_path / "runs.csv", index=False)
    assert main(["next", *flags, "--tolerance=0.5"]) == 2
    assert "runs.csv: 4 runs do not tell the exponents apart: add runs" in capsys.readouterr().err


def test_batches_divide_and_keep_the_tokens():
    for params, tokens in ((2e7, 4e8), (1e9, 2e10), (7e10, 1.4e12)):
        config = overrides(nearest_shape(params), tokens, devices=16)
        assert config["train.batch"] % 16 == 0
        trained = config["train.batch"] * config["train.steps"] * config["data.seq_len"]
        assert trained == pytest.approx(tokens, rel=0.01)
        assert config["train.steps"] >= 140  # 200, with a batch that is up to a root of two larger
        assert config["optimizer.schedule.warmup"] < config["train.steps"]


def test_the_command_writes_one_object_of_overrides_a_cell(tmp_path, capsys):
    out = tmp_path / "cells.json"
    assert main(["design", "--budget=1e20", "--target=1e23", f"--out={out}"]) == 0
    cells = json.loads(out.read_text())
    assert 6 < len(cells) <= 41
    assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)
    for cell in cells:
        assert set(cell) == set(overrides(nearest_shape(1e8), 2e9))
    assert f"{len(cells)} cells" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["design", "next"])
def test_every_cell_is_a_config(command, tmp_path):
    """Every key is a setting, and all of them together are a run that can start."""
    load = pytest.importorskip("lmjax.config").load
    sweep, out = simulate(EPOCH, Faults(noise_sd=0.003), seed=2), tmp_path / "cells.json"
    columns = {"params": sweep.params, "tokens": sweep.tokens, "loss": sweep.loss[0]}
    pd.DataFrame(columns).to_csv(tmp_path / "runs.csv", index=False)
    flags = {
        "design": ["--budget=1e20"],
        "next": [f"--runs={tmp_path / 'runs.csv'}", "--largest=1e20", "--tolerance=0.001"],
    }[command]
    assert main([command, "--target=1e24", *flags, f"--out={out}"]) == 0
    for cell in json.loads(out.read_text()):
        cfg = load(str(ROOT / "configs" / "quickstart.py"), [f"{key}={value}" for key, value in cell.items()])
        for key, value in cell.items():
            group, *middle, last = key.split(".")
            node = getattr(cfg, group)
            for part in middle:
                node = getattr(node, part)
            assert getattr(node, last) == value
