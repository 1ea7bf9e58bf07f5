"""The commands end to end, on simulated runs: report, verify, predict, score, compare; and that jax stays out."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.estimates import Options
from analysis.figures import FIGURES
from analysis.page import people
from analysis.runs import load_runs
from analysis.simulate import EPOCH, Faults, simulate
from analysis.study import make_study

# Figures of what these runs lack: curves, repeated data, settings, downstream errors, stages.
NEED_MORE = {
    "training-curves", "repeats", "hyperparameters", "learning-rate-batch", "downstream-error", "stages",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """63 runs; learning rates are tried at three cells, and one run has diverged."""
    sweep = simulate(EPOCH, Faults(noise_sd=0.003), seed=4)
    columns = {"params": sweep.params, "tokens": sweep.tokens, "flops": sweep.budget, "loss": sweep.loss[0]}
    frame = pd.DataFrame(columns).assign(run=[f"run{i}" for i in range(63)], seq_len=4096)
    frame = pd.concat([frame, frame.iloc[:1].assign(run="diverged", loss=np.nan)])
    path = tmp_path_factory.mktemp("runs") / "runs.csv"
    frame.to_csv(path, index=False)
    return str(path)


@pytest.fixture(scope="module")
def report(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    flags = ["--exclude-invalid", "--replicates=200"]
    assert main(["report", f"--runs={source}", "--target=1e23", f"--out={out}", *flags]) == 0
    return out


def test_a_report_holds_figures_numbers_and_a_page(report):
    numbers = json.loads((report / "numbers.json").read_text())
    names = {path.stem for path in (report / "figures").glob("*.png")}
    assert names == set(FIGURES) - NEED_MORE
    for name in names:
        assert (report / "figures" / f"{name}.pdf").stat().st_size > 1000
        assert len(pd.read_csv(report / "figures" / f"{name}.csv")) > 0
    page = (report / "report.html").read_text()
    assert page.count("data:image/png") == len(names) and "http" not in page.replace("http-equiv", "")
    assert numbers["provenance"]["exclusions"] == [{"reason": "loss missing or NaN", "runs": ["diverged"]}]
    assert numbers["optimizer"]["converged"] == 1.0
    methods = {row["method"]: row for row in numbers["estimates"]}
    assert len(methods) == 5 and "approach 1 (envelope)" in numbers["absent"]
    for row in methods.values():
        assert row["params_exponent_low"] < row["params_exponent"] < row["params_exponent_high"]
        assert abs(row["params_exponent"] - EPOCH.params_exponent) < 0.05
    next_run = json.loads((report / "next.json").read_text())[0]
    assert next_run["data.seq_len"] == next_run["model.context"] == 4096 and "rows of 4,096 tokens, as the" in page
    spent = 6 * 12 * next_run["model.layers"] * next_run["model.embed"] ** 2
    spent *= next_run["train.batch"] * next_run["train.steps"] * next_run["data.seq_len"]
    assert spent == pytest.approx(1e23, rel=0.02)


def test_verify_derives_every_number_again(report, capsys):
    assert main(["verify", str(report)]) == 0
    assert int(capsys.readouterr().out.split(": ")[1].split()[0]) > 1000


def tampered(report: Path, copy: Path, name: str, change) -> Path:
    """A copy of the report in which `change` was applied to one of its files."""
    shutil.copytree(report, copy)
    (copy / name).write_text(change((copy / name).read_text()))
    return copy


def with_another_loss(text: str) -> str:
    frame = pd.read_csv(io.StringIO(text))
    frame.loc[3, "loss"] *= 1.001
    return frame.to_csv(index=False)


def with_another_exponent(text: str) -> str:
    numbers = json.loads(text)
    numbers["estimates"][0]["params_exponent"] += 1e-4
    return json.dumps(numbers)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("figures/residuals.csv", with_another_loss, "figures/residuals.csv: loss row 3"),
        ("numbers.json", with_another_exponent, "numbers.json: estimates[0]: params_exponent"),
        ("numbers.json", lambda text: text[:-20], "numbers.json: not valid JSON"),
        ("numbers.json", lambda text: text.replace('"data_sha256": "', '"data_sha256": "0'), "the data have changed"),
    ],
)
def test_verify_notices_what_was_changed(report, tmp_path, capsys, name, change, says):
    assert main(["verify", str(tampered(report, tmp_path / "copy", name, change))]) == 2
    assert says in capsys.readouterr().err


def test_methods_that_disagree_are_named(tmp_path):
    """A grid that drifts off the optimum biases parabolas; their noise intervals do not know, the comparison does."""
    drifting = simulate(EPOCH, Faults(noise_sd=0.0005, drift=5.0), seed=4)
    centred = simulate(EPOCH, Faults(noise_sd=0.003), seed=4)
    found = []
    for sweep in (drifting, centred):
        columns = {"params": sweep.params, "tokens": sweep.tokens, "flops": sweep.budget, "loss": sweep.loss[0]}
        pd.DataFrame(columns).to_csv(tmp_path / "runs.csv", index=False)
        study = make_study(load_runs(tmp_path / "runs.csv"), Options(target=1e23, replicates=200))
        found.append(study.disagreement)
    assert "approach 3 (Huber) says" in found[0] and "approach 2 (parabola)" in found[0]
    assert found[1] == ""


def test_forecasts_are_scored_hashed_and_never_overwritten(source, tmp_path, capsys):
    out = tmp_path / "forecast.json"
    flags = [f"--runs={source}", "--exclude-invalid", "--size=2e10", "--tokens=4e11", f"--out={out}"]
    assert main(["predict", *flags]) == 0
    assert main(["predict", *flags]) == 2 and "never overwritten" in capsys.readouterr().err
    truth = float(EPOCH.loss(2e10, 4e11))
    assert main(["score", str(out), f"--loss-value={truth}"]) == 0
    assert "1 of 1 inside" in capsys.readouterr().out
    assert main(["score", str(out), "--loss-value=3.0"]) == 0
    assert "0 of 1 inside" in capsys.readouterr().out
    done = tmp_path / "done.csv"
    done.write_text(f"params,tokens,loss\n2.01e10,4.0e11,{truth}\n")
    assert main(["score", str(out), f"--runs={done}"]) == 0
    assert "1 of 1 inside" in capsys.readouterr().out
    edited = json.loads(out.read_text())
    edited["high"] = 9.0
    out.write_text(json.dumps(edited))
    assert main(["score", str(out), "--loss-value=3.0"]) == 2
    assert "was edited after" in capsys.readouterr().err


def workdir(root: Path, name: str, loss: float, **config) -> None:
    path = root / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model": {"layers": 4}, "data": {"seq_len": 256}, **config}))
    rows = [
        {"step": s, "tokens": 1e6 * s, "flops": 6e14 * s, "train/loss": 5 - s, "val/text/loss": loss + 3 - s}
        for s in (1, 2, 3)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "summary.json").write_text(json.dumps({"status": "finished", "params/total": 1e8, "flops_6nd": 1.8e15}))


def test_compare_sorts_by_loss_and_shows_what_differs(tmp_path, capsys):
    workdir(tmp_path, "slow", 3.0, optimizer={"learning_rate": 1e-4})
    workdir(tmp_path, "fast", 2.5, optimizer={"learning_rate": 1e-3})
    workdir(tmp_path, "wide", 2.8, optimizer={"learning_rate": 1e-3, "name": "muon"})
    out = tmp_path / "comparison"
    assert main(["compare", str(tmp_path), f"--out={out}"]) == 0
    table = pd.read_csv(out / "runs.csv")
    assert list(table["run"]) == ["fast", "wide", "slow"]
    assert {"config.optimizer.learning_rate", "config.optimizer.name"} <= set(table.columns)
    assert not {"config.model.layers", "config.data.seq_len"} & set(table.columns)
    assert (out / "curves.png").stat().st_size > 1000 and len(pd.read_csv(out / "curves.csv")) == 9
    assert "fast" in capsys.readouterr().out.splitlines()[1]
    assert main(["compare", str(tmp_path / "nothing")]) == 2


def test_losses_of_different_validation_sets_are_told(tmp_path, capsys):
    for name, digest in (("one", "aa"), ("two", "aa"), ("other", "bb")):
        workdir(tmp_path, name, 3.0)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        told = {"data/text/valid_digest": digest, "data/else/valid_digest": name}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary | told))
    assert main(["compare", str(tmp_path), "--loss=val/text/loss"]) == 0
    assert "2 different validation sets" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--loss=val/text/loss"]) == 0
    assert "different validation sets" not in capsys.readouterr().out
    runs = load_runs(str(tmp_path), loss="val/text/loss")
    assert any("--where=loss_digest=aa" in note for note in runs.notes)
    assert len(load_runs(str(tmp_path), loss="val/text/loss", where={"loss_digest": "aa"}).table) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["report"],
        ["report", "--runs=x.csv", "--target=-1", "--out=y"],
        ["report", "--runs=x.csv", "--target=1e23", "--out=y", "--replicates=5"],
        ["design", "--budget=1e20", "--target=1e23", "--ratios=20", "--out=x"],
        ["design", "--budget=1e10", "--target=1e23", "--out=x"],
        ["score", "nothing.json", "--loss-value=2"],
        ["verify", "nowhere"],
        ["fly"],
    ],
)
def test_misuse_is_one_line_and_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lmjax analysis: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("report --runs={source} --target=1e23 --out={out}", "estimates.csv"),
        ("report --runs={source} --target=1e23 --out={out}", "figures/contours.png"),
        ("report --runs={source} --target=1e23 --out={out}", "numbers.json"),
        ("design --budget=1e20 --target=1e23 --out={out}/cells.csv", "cells.csv"),
        ("predict --runs={source} --size=1e9 --tokens=2e10 --out={out}/table.csv", "table.csv"),
        ("compare {runs} --out={out}", "runs.csv"),
    ],
)
def test_files_of_others_are_not_written_over(source, tmp_path, capsys, command, name):
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "flops": 60, "val/a/loss": 3.0}\n')
    (run / "summary.json").write_text('{"status": "finished", "step": 1, "params/total": 5, "tokens": 10}')
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("N,D,loss\nsomebody's table\n")
    words = command.format(source=source, out=tmp_path / "out", runs=tmp_path / "runs").split()
    assert main(words + ["--exclude-invalid"] * ("--runs" in command)) == 2
    assert f"{name} " in capsys.readouterr().err
    assert theirs.read_text() == "N,D,loss\nsomebody's table\n"


def test_neither_jax_is_imported_nor_more_of_lmjax_than_is_shared():
    """In a new process: this one has imported everything."""
    code = "import sys, analysis.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "analysis.cells" in imported and not imported & {"jax", "flax", "optax", "wandb", "pydantic"}
    shared = {"errors", "models", "models.shapes", "optim", "optim.hyperparameters"}
    assert {name for name in imported if name.startswith("lmjax.")} == {f"lmjax.{name}" for name in shared}


def test_without_the_extra_one_line_says_what_to_install():
    code = "import runpy, sys; sys.modules['pandas'] = None; runpy.run_module('analysis', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "lmjax analysis: error: pandas is not installed; pip install -e .[analysis]\n"


def test_a_refusal_after_the_progress_has_a_line_of_its_own(source, tmp_path, capsys):
    pd.read_csv(source).head(4).to_csv(tmp_path / "four.csv", index=False)
    assert main(["report", f"--runs={tmp_path / 'four.csv'}", "--target=1e23", f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr()
    assert (said.out + said.err).splitlines()[-1].startswith("lmjax analysis: error: ")


def test_the_report_opens_with_the_answer_for_people(report):
    page, methods = (report / "report.html").read_text(), pd.read_csv(report / "estimates.csv")
    first = methods.iloc[0]
    assert page.index("With 1e+23 FLOPs train") < page.index("<table") and "nats per token" in page.split("</p>")[0]
    assert f"{first['params'] / 1e9:.3g}B" in page and f"{first['params']:.4g}" in page


@pytest.mark.parametrize(("count", "says"), [(4.41e10, "44.1B"), (3.8e11, "380B"), (1e6, "1M"), (12.0, "12")])
def test_counts_are_written_for_people(count, says):
    assert people(count) == says


def test_the_flag_for_vertices_beyond_the_grid_reaches_the_fit(monkeypatch, capsys):
    def refuse(inputs, out, tell):
        raise ValueError(str(inputs.options))

    monkeypatch.setattr("analysis.report.write_report", refuse)
    flags = ["--runs=x.csv", "--target=1e23", "--out=y", "--near-optimal=0.005"]
    assert main(["report", *flags, "--vertices-beyond-grid"]) == 2
    said = capsys.readouterr().err
    assert "interior_only=False" in said and "near_optimal=0.005" in said
