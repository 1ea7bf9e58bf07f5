"""Tables on which a law cannot be fitted, or not trusted: said in words, and never by a warning of numpy."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.estimates import Options, seed_means
from analysis.page import amount, answer
from analysis.report import Inputs, draw, write_report
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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (4.4e10, "44B"), (3.8e11, "380B"), (1.234e12, "1.23T"), (9.996e11, "1T"), (5.6e8, "560M"), (31_400, "31.4k"),
        (1.05e6, "1.05M"), (12.0, "12"), (2e15, "2,000T"),
    ],
)  # fmt: skip
def test_amounts_for_people(value, shown):
    assert amount(value) == shown


def test_the_page_begins_with_the_answer_and_folds_what_is_left_out(tmp_path):
    frame = pd.concat([table(), table().iloc[:2].assign(flops=3.3e18)])  # a budget of two sizes
    study = make_study(loaded(tmp_path, frame), Options(1e23, replicates=100))
    best = study.estimates[0]
    assert f"{amount(best.params.value)} parameters on {amount(best.tokens.value)} tokens" in answer(study)
    assert f"{best.loss.value:.3f}" in answer(study) and "times the largest run" in answer(study)
    left_out = dict(study.left_out)
    assert [round(budget / 1e17) for budget in left_out["only 2 sizes"]] == [33]
    assert not any("only 2 sizes" in warning for warning in study.warnings)  # they are one line a method
    assert sum("have no optimum that can be used" in warning for warning in study.warnings) == len(study.isoflops)
    inputs = Inputs(str(tmp_path / "runs.csv"), study.options)
    write_report(inputs, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.index('class="answer"') < html.index("<h2>") and html.count("only 2 sizes") == 1


def test_runs_far_off_the_fit_are_named_with_what_they_change(tmp_path):
    frame = table()
    frame.loc[[7, 20], "loss"] += 0.2
    study = make_study(loaded(tmp_path, frame), Options(1e23, replicates=100))
    [note] = [warning for warning in study.warnings if "off the fit" in warning]
    without = make_study(load_runs(tmp_path / "runs.csv", exclude=("7", "20")), Options(1e23, replicates=100))
    assert "2 runs lie over 6 standard deviations off the fit; without them, --exclude=7,20," in note
    assert f"C^{without.huber.surface.params_exponent:.3g} instead" in note
    assert not any("off the fit" in warning for warning in without.warnings)
