"""Tables on which a law cannot be fitted, or not trusted: said in words, and never by a warning of numpy."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest

from analysis import page
from analysis.__main__ import main
from analysis.estimates import Options, seed_means
from analysis.report import draw, draw_one
from analysis.runs import load_runs
from analysis.simulate import EPOCH, Faults, simulate
from analysis.study import make_study


def table() -> pd.DataFrame:
    sweep = simulate(EPOCH, Faults(noise_sd=0.003), seed=4)
    columns = {"params": sweep.params, "tokens": sweep.tokens, "flops": sweep.budget, "loss": sweep.loss[0]}
    return pd.DataFrame(columns)


def loaded(tmp_path, frame: pd.DataFrame):
    frame.to_csv(tmp_path / "runs.csv", index=False)
    return load_runs(tmp_path / "runs.csv")


@pytest.mark.parametrize(
    "loss",
    [
        lambda t: 1.8 + 2085 * t["tokens"] ** -0.3658,
        lambda t: 1.8 + 482 * t["params"] ** -0.3478,
        lambda t: 2.5 + np.random.default_rng(0).normal(0, 0.05, 63),
    ],
    ids=["of tokens alone", "of size alone", "noise"],
)
def test_a_loss_without_a_law_is_refused_by_name(tmp_path, loss):
    runs = loaded(tmp_path, table().assign(loss=loss))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(ValueError, match=r"runs\.csv: loss does not fall with both N and D"):
            make_study(runs, Options(1e23, replicates=100))


def test_two_sizes_are_fitted_with_a_warning(tmp_path):
    cells = [(n, d, EPOCH.loss(n, d)) for n in (1e8, 1e9) for d in np.geomspace(1e9, 1e11, 5)]
    runs = loaded(tmp_path, pd.DataFrame(cells, columns=["params", "tokens", "loss"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        study = make_study(runs, Options(1e23, replicates=100))
        draw(study)
    assert any("only two values of N" in warning for warning in study.warnings)


def test_one_work_directory_alone_is_refused_by_name(tmp_path, capsys):
    path = tmp_path / "only"
    path.mkdir()
    rows = [{"step": s, "tokens": 1e7 * s, "flops": 6e15 * s, "val/text/loss": 4 - s / 10} for s in range(1, 9)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "summary.json").write_text(json.dumps({"status": "finished", "params/total": 1e8, "tokens": 8e7}))
    assert main(["report", f"--runs={path}", "--target=1e23", f"--out={tmp_path / 'out'}"]) == 2
    assert f"{path}: a scaling law needs at least 6 runs, got 1: add runs" in capsys.readouterr().err


def test_seeds_of_one_cell_are_averaged_for_isoflops(tmp_path):
    frame = pd.concat([table().assign(seed=seed, loss=lambda t, s=seed: t["loss"] + 0.01 * s) for seed in (0, 1, 2)])
    runs = loaded(tmp_path, frame)
    params, _, loss, _ = seed_means(runs, runs.column("flops"))
    assert len(params) == 63 and sorted(loss) == pytest.approx(sorted(table()["loss"] + 0.01))


def test_runs_far_off_the_fit_are_named_with_what_they_change(tmp_path):
    frame = table()
    frame.loc[[7, 20], "loss"] += 0.2
    study = make_study(loaded(tmp_path, frame), Options(1e23, replicates=100))
    [note] = [warning for warning in study.warnings if "off the fit" in warning]
    without = make_study(load_runs(tmp_path / "runs.csv", exclude=("7", "20")), Options(1e23, replicates=100))
    assert "2 runs lie over 6 standard deviations off the fit; without them, --exclude=7,20," in note
    assert f"C^{without.huber.surface.params_exponent:.3g} instead" in note
    assert not any("off the fit" in warning for warning in without.warnings)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A study of which two budgets have too few sizes."""
    frame = table().drop(index=[0, 1, 2, 7, 8, 9])
    return make_study(loaded(tmp_path_factory.mktemp("drawn"), frame), Options(1e23, replicates=100))


def test_flagged_budgets_are_one_folded_table_of_the_page(drawn):
    assert any("only 4 sizes" in flag for flag in drawn.budget_flags)
    assert not any("budget" in warning for warning in drawn.warnings)
    assert page._flagged_budgets(drawn).count("<details>") == 1


def test_every_residual_lies_inside_its_panels(drawn):
    violin, *panels = draw_one("residuals", drawn).figure.axes
    most = 100 * np.abs(drawn.huber.log_residuals).max()
    assert violin.get_xlim()[1] >= most and all(axes.get_ylim()[1] >= most for axes in panels)


def test_contour_labels_lie_inside_the_axes(drawn):
    axes = draw_one("contours", drawn).figure.axes[0]
    levels = [text for text in axes.texts if text.get_text() != "target"]
    to_axes = axes.transAxes.inverted()
    places = [to_axes.transform(text.get_transform().transform(text.get_position())) for text in levels]
    assert len(levels) >= 6 and all(0.05 < x < 0.95 for place in places for x in place)
