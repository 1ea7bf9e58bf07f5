"""Tables of runs: every source gives the same tidy table, and every bad table one clear line."""

import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from analysis import wandb_runs
from analysis.__main__ import main
from analysis.runs import load_runs
from analysis.simulate import EPOCH, simulate


def table(**changes) -> pd.DataFrame:
    sweep = simulate(EPOCH)
    columns = {"params": sweep.params, "tokens": sweep.tokens, "flops": sweep.budget, "loss": sweep.loss[0]}
    return pd.DataFrame(columns).assign(**changes)


def written(tmp_path, frame: pd.DataFrame, name="runs.csv") -> str:
    path = tmp_path / name
    frame.to_parquet(path) if name.endswith("parquet") else frame.to_csv(path, index=False)
    return str(path)


def refusal(tmp_path, capsys, frame: pd.DataFrame, *flags: str) -> str:
    """The one line that `report` prints for a bad table."""
    source = written(tmp_path, frame)
    code = main(["report", f"--runs={source}", "--target=1e23", f"--out={tmp_path / 'out'}", *flags])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and error.startswith("lmjax analysis: error: ")
    assert not (tmp_path / "out").exists()
    return error


def with_value(column: str, row: int, value) -> pd.DataFrame:
    frame = table()
    frame[column] = frame[column].astype(object)
    frame.loc[row, column] = value
    return frame


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (table().drop(columns="loss"), "no column for loss (it has params, tokens, flops): name it with --loss"),
        (table().drop(columns=["params", "tokens"]), "needs two of params, tokens, flops"),
        (with_value("loss", 3, np.nan), "loss is missing or NaN in 1 of 63 rows, first in row 3"),
        (with_value("loss", 3, 0.0), "loss is zero or negative in 1 of 63 rows, first in row 3"),
        (with_value("loss", 3, -1.0), "loss is zero or negative"),
        (with_value("loss", 3, np.inf), "loss is infinite"),
        (with_value("params", 5, "big"), "column 'params' row 5 is 'big', not a number"),
        (with_value("flops", 9, -7446744073709551616), "int64 overflow of 6ND wraps to negative"),
        (table(flops_convention=["6nd"] * 40 + ["exact"] * 23), "mixed FLOP conventions: 6nd (40 rows), exact (23"),
        (table(loss_kind=["train"] * 10 + ["val"] * 53), "mixed losses: val (53 rows), train (10 rows)"),
        (table(loss=2.5), "loss is the same in all runs: no law can be fitted"),
        (table(loss=lambda t: 6.0 - t["loss"]), "loss does not fall with both N and D as a power law"),
        (table().head(7), "one budget only (6e+18 FLOPs): no law in C can be fitted"),
        (table().iloc[:36:9], "needs at least 6 runs, got 4"),
        (table(flops=lambda t: t["flops"] / np.where(t.index < 30, 3.0, 1.0)), "6ND / flops is about 1 in 33 rows and"),
    ],
)
def test_bad_tables_get_one_clear_line(tmp_path, capsys, frame, says):
    assert says in refusal(tmp_path, capsys, frame)


def test_two_points_in_a_budget_are_flagged_not_used(tmp_path, capsys):
    frame = table().drop(index=[0, 1, 2, 3, 4])
    source = written(tmp_path, frame)
    flags = [f"--runs={source}", "--target=1e23", f"--out={tmp_path / 'out'}", "--replicates=100"]
    assert main(["report", *flags]) == 0
    assert "parabola in N, only 2 sizes at budget 6e+18" in capsys.readouterr().out


def test_empty_missing_and_broken_files(tmp_path, capsys):
    assert "the table has no rows" in refusal(tmp_path, capsys, table().iloc[:0])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    for source, says in (
        ("absent.csv", "no such file"),
        ("broken.parquet", "not a readable"),
        ("", "no metrics.jsonl"),
    ):
        with pytest.raises(ValueError, match=says):
            load_runs(tmp_path / source)


def test_invalid_rows_are_dropped_only_when_asked_and_recorded(tmp_path):
    frame = with_value("loss", 3, np.nan)
    frame.loc[4, "loss"] = -1.0
    runs = load_runs(written(tmp_path, frame), exclude_invalid=True)
    assert len(runs.table) == 61
    assert {e.reason: len(e.runs) for e in runs.exclusions} == {"loss missing or NaN": 1, "loss zero or negative": 1}


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by row"])
def test_runs_are_excluded_by_name_and_recorded(tmp_path, named):
    frame = table().assign(run=[f"run{i}" for i in range(63)]) if named else table()
    exclude = ("run3", "run50") if named else ("3", "50")
    runs = load_runs(written(tmp_path, frame), exclude=exclude)
    assert [(e.reason, e.runs) for e in runs.exclusions] == [("named by --exclude", exclude)]
    np.testing.assert_array_equal(runs.column("loss"), table()["loss"].drop([3, 50]))
    with pytest.raises(ValueError, match="no run is named nobody: change --exclude"):
        load_runs(written(tmp_path, frame), exclude=("nobody", exclude[0]))


def test_huge_integers_do_not_overflow(tmp_path):
    frame = table().head(8)
    frame["params"] = [10**12 + i for i in range(8)]
    frame["tokens"] = [3 * 10**13] * 8
    runs = load_runs(written(tmp_path, frame.drop(columns="flops")))
    assert runs.column("flops") == pytest.approx(1.8e26, rel=1e-9) and runs.table["params"].dtype == np.float64


@pytest.mark.parametrize("column", ["params", "tokens", "flops"])
def test_the_third_of_n_d_c_is_derived(tmp_path, column):
    runs = load_runs(written(tmp_path, table().drop(columns=column)))
    assert runs.column(column) == pytest.approx(table()[column].to_numpy())
    assert f"{column} was derived by C = 6ND" in runs.notes


def test_forward_only_labels_are_reported(tmp_path):
    runs = load_runs(written(tmp_path, table(flops=lambda t: t["flops"] / 3)))
    assert any("6ND / flops is 3 " in note and "forward pass" in note for note in runs.notes)


def test_published_column_names_and_own_ones(tmp_path):
    renamed = table().rename(columns={"params": "Model Size", "flops": "Training FLOP", "tokens": "D", "loss": "x"})
    runs = load_runs(written(tmp_path, renamed), columns={"loss": "x"})
    assert runs.points[0] == pytest.approx(table()["params"].to_numpy())
    with pytest.raises(ValueError, match="no column 'y' for loss"):
        load_runs(written(tmp_path, renamed), columns={"loss": "y"})


def test_parquet_and_csv_are_the_same(tmp_path):
    csv, parquet = (load_runs(written(tmp_path, table(), name)) for name in ("a.csv", "a.parquet"))
    assert csv.column("loss") == pytest.approx(parquet.column("loss"))


def test_selecting_rows(tmp_path):
    source = written(tmp_path, table(stage=["a"] * 30 + ["b"] * 33))
    assert len(load_runs(source, where={"stage": "a"}).table) == 30
    with pytest.raises(ValueError, match=r"no row has stage=c \(values: a, b\)"):
        load_runs(source, where={"stage": "c"})


OTHERS = {
    "chinchilla": lambda t: t.drop(columns="tokens").rename(columns={"params": "Model Size", "flops": "Training FLOP"}),
    "kaplan": lambda t: t.assign(flops=t["flops"] / 8.64e19).rename(
        columns={"flops": "compute (PF-days)", "params": "N"}
    ),
    "millions": lambda t: t.assign(params=t["params"] / 1e6, tokens=t["tokens"] / 1e9).rename(
        columns={"params": "modelSize (M)", "tokens": "tokens_B"}
    ),
    "letters": lambda t: t.assign(
        params=[f"{n / 1e6:.6f}M" for n in t["params"]], flops=[f"{c:,.0f}" for c in t["flops"]]
    ),
    "wandb": lambda t: pd.concat([t.assign(State="finished"), t.head(3).assign(State="crashed", loss=np.nan)]).rename(
        columns={"params": "params/total", "loss": "val/loss", "flops": "flops_6nd"}
    ),
    "unsorted": lambda t: t.sample(frac=1.0, random_state=1).assign(gpu=8, note=np.nan, train_loss=1.0),
}  # fmt: skip


OTHERS |= {
    "llama": lambda t: t.drop(columns="params").rename(
        columns={"flops": "compute_budget", "tokens": "training_tokens", "loss": "validation_loss"}
    ),
    "prefixed": lambda t: t.assign(flops=t["flops"] / 1e18, tokens=t["tokens"] / 1e9).rename(
        columns={"flops": "Training exaFLOPs", "tokens": "Tokens in billions", "loss": "loss (nats)"}
    ),
    "words": lambda t: t.assign(
        params=[f"{n / 1e9:.9f} billion" for n in t["params"]], tokens=t["tokens"] / 1e6
    ).rename(columns={"params": "# Parameters", "tokens": "Million tokens", "loss": " Final Loss "}),
    "megatron": lambda t: t.drop(columns="flops").assign(batch="small").rename(
        columns={"tokens": "consumed_train_tokens", "params": "trainable_params", "loss": "lm loss"}
    ),
    "marin": lambda t: t.assign(flops=t["flops"] / 1e9).rename(
        columns={"params": "parameter_count", "flops": "throughput/total_gflops", "loss": "eval/loss"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", OTHERS)
def test_tables_shaped_like_others_read_the_same(tmp_path, shape):
    runs = load_runs(written(tmp_path, OTHERS[shape](table())))
    order = np.argsort(runs.column("params"))
    for name in ("params", "tokens", "flops", "loss"):
        want = table().sort_values("params")[name].to_numpy()
        assert runs.column(name)[order] == pytest.approx(want, rel=1e-6), name


def test_semicolons_and_tabs_are_read(tmp_path):
    for sign in (";", "\t"):
        table().to_csv(tmp_path / "runs.csv", index=False, sep=sign)
        assert len(load_runs(tmp_path / "runs.csv").table) == 63


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.assign(flops=t["flops"] / 1e15), "6 x params x tokens / flops is 1e+15"),
        (lambda t: t.assign(params=t["params"] / 1e6), "tokens / params is"),
        (lambda t: t.drop(columns="flops").assign(params=t["params"] / 1e6), "tokens / params is"),
        (lambda t: t.drop(columns="flops").assign(tokens=t["tokens"] / 1e9), "tokens is 409.9 at most"),
        (lambda t: t.assign(ppl=np.exp(t["loss"])).drop(columns="loss"), "'ppl' is a perplexity"),
    ],
)
def test_sizes_in_unnamed_units_are_refused(tmp_path, capsys, change, says):
    assert says in refusal(tmp_path, capsys, change(table()))


def test_losses_in_other_units_are_named_or_refused(tmp_path):
    source = written(tmp_path, table(ppl=lambda t: np.exp(t["loss"]), val_bpb=lambda t: t["loss"] / 3))
    assert load_runs(source).loss_unit == "nats per token"
    assert load_runs(source, loss="val_bpb").loss_unit == "bits per byte"
    with pytest.raises(ValueError, match="'ppl' is a perplexity"):
        load_runs(source, loss="ppl")


def test_a_table_of_steps_is_its_last_steps_and_their_curves(tmp_path):
    steps = [
        {"run": f"run{i}", "step": s, "params": row.params, "tokens": row.tokens * s / 5, "loss": row.loss + 5 - s}
        for i, row in enumerate(table().itertuples())
        for s in range(1, 6)
    ]
    frame = pd.DataFrame(steps)
    frame.loc[frame["step"] == 4, "loss"] = np.nan  # not evaluated there
    runs = load_runs(written(tmp_path, frame))
    assert sorted(runs.column("loss")) == pytest.approx(sorted(table()["loss"])) and len(runs.curves) == 63 * 4
    assert runs.curves["flops"].max() == pytest.approx(table()["flops"].max())


def curves(**changes) -> pd.DataFrame:
    """Losses along the training of twelve runs, two rates at each of six sizes; nothing names the runs."""
    frames = []
    for size in np.geomspace(1e7, 1e9, 6):
        for rate in (1e-3, 2e-3):
            step = np.arange(1, 51)
            tokens = step * 4e8 * (size / 1e8) ** 0.5
            frame = {"N": size, "lr": rate, "current_steps": step, "tokens": tokens, "loss": EPOCH.loss(size, tokens)}
            frames.append(pd.DataFrame(frame))
    table = pd.concat(frames, ignore_index=True)
    table["loss"] += 0.1 * table["lr"] / 1e-3
    return table.assign(**changes)


@pytest.mark.parametrize("changes", [{}, {"id": range(600)}], ids=["unnamed", "rows numbered"])
def test_curves_are_not_taken_for_runs(tmp_path, capsys, changes):
    says = refusal(tmp_path, capsys, curves(**changes))
    assert "600 rows of 6 sizes" in says and "--columns=run=COLUMN" in says


def test_curves_without_a_step_column_are_not_taken_for_runs(tmp_path, capsys):
    assert "points of loss curves" in refusal(tmp_path, capsys, curves().drop(columns="current_steps"))


@pytest.mark.parametrize("step", ["current_steps", "iterations", "tokens"])
def test_the_columns_that_tell_runs_apart_repair_a_table_of_curves(tmp_path, step):
    frame = curves().rename(columns={"current_steps": step}) if step != "tokens" else curves()
    runs = load_runs(written(tmp_path, frame), columns={"run": "N+lr"})
    last = curves().groupby(["N", "lr"])["tokens"].max().sort_values()
    assert sorted(runs.column("tokens")) == pytest.approx(list(last)) and len(runs.curves) == 600
    with pytest.raises(ValueError, match="no column 'rate' for run"):
        load_runs(written(tmp_path, frame), columns={"run": "N+rate"})


def test_runs_of_many_durations_are_read_when_they_are_named(tmp_path):
    frame = curves(name=[f"run{i}" for i in range(600)]).drop(columns="current_steps")
    assert len(load_runs(written(tmp_path, frame)).table) == 600


def test_a_short_runs_length_is_no_step_of_a_curve(tmp_path):
    """Nine sizes by name, each trained seven times from scratch."""
    frame = table(name=[f"size{i % 7}" for i in range(63)], steps=lambda t: t["tokens"] / 1e5)
    assert len(load_runs(written(tmp_path, frame)).table) == 63


def test_batches_in_sequences_and_epochs_are_derived(tmp_path):
    frame = table(batch_size=512, seq_len=2048, epochs=4.0)
    runs = load_runs(written(tmp_path, frame))
    assert (runs.column("batch_tokens") == 2**20).all()
    assert runs.column("unique_tokens") == pytest.approx(frame["tokens"] / 4)


@pytest.mark.parametrize(("summed", "logged"), [(None, "NaN"), (float("nan"), "NaN"), (None, None)])
def test_a_run_that_ends_at_no_number_has_no_loss(tmp_path, summed, logged):
    """Not that of an evaluation before. `summary.json` has null, metrics.jsonl "NaN"."""
    path = workdir(tmp_path, "run")
    summary, metrics = json.loads((path / "summary.json").read_text()), path / "metrics.jsonl"
    (path / "summary.json").write_text(json.dumps(summary | {"val/text/loss": summed}))
    *rows, last = map(json.loads, metrics.read_text().splitlines())
    last["val/text/loss"] = logged
    metrics.write_text("".join(json.dumps(row) + "\n" for row in [*rows, last]))
    workdir(tmp_path, "sound")
    with pytest.raises(ValueError, match="loss is missing or NaN in 1 of 2 rows"):
        load_runs(tmp_path)


@pytest.mark.parametrize("length", [0, -1, 512.5, float("inf"), "long"])
def test_what_is_no_length_is_none(tmp_path, length):
    assert load_runs(written(tmp_path, table(**{"config.data.seq_len": length}))).sequence_length is None


def test_the_length_of_rows_is_known_where_all_runs_have_the_same(tmp_path):
    assert load_runs(written(tmp_path, table())).sequence_length is None
    assert load_runs(written(tmp_path, table(seq_len=512))).sequence_length == 512
    for name, length in (("a/one", 256), ("a/two", 256), ("b/one", 256), ("b/two", 128)):
        workdir(tmp_path, name, data={"seq_len": length})
    assert load_runs(tmp_path / "a").sequence_length == 256 and load_runs(tmp_path / "b").sequence_length is None


def test_what_was_derived_is_not_called_absent(tmp_path):
    for column, counted in (("params", ("C / 6D", "as labelled")), ("flops", ("as labelled", "6nd"))):
        runs = load_runs(written(tmp_path, table().drop(columns=column)))
        assert (runs.params_convention, runs.flops_convention) == counted


def test_copies_of_rows_are_noted(tmp_path):
    runs = load_runs(written(tmp_path, pd.concat([table(), table().head(5)])))
    assert any(note.startswith("5 rows repeat another's N, D and loss exactly") for note in runs.notes)


def test_runs_of_one_name_in_two_folders_stay_apart(tmp_path):
    for folder, loss in (("a", 2.9), ("b", 2.5)):
        workdir(tmp_path / folder, "run", losses=(3.5, 3.1, loss))
    runs = load_runs(tmp_path)
    assert runs.table["run"].nunique() == 2 and runs.curves.groupby("run")["loss"].min().tolist() == [2.9, 2.5]


# Work directories -------------------------------------------------------------------------------------------------


def workdir(root, name, *, size=1e8, losses=(3.5, 3.1, 2.9), status="finished", torn=False, **config):
    path = root / name
    path.mkdir(parents=True)
    config = {"train": {"seed": 0, "steps": 300}, "optimizer": {"schedule": {"name": "cosine"}}, **config}
    (path / "config.json").write_text(json.dumps(config))
    lines = [{"event": "start", "step": 0}]
    for i, loss in enumerate(losses, start=1):
        counters = {"step": 100 * i, "tokens": 1e9 * i, "flops": 6 * size * 1e9 * i, "optim/lr": 1e-3 / i}
        lines.append({**counters, "train/loss": loss + 0.1, "val/text/loss": loss, "val/text/loss_stderr": 0.002})
    text = "\n".join(map(json.dumps, lines)) + "\n" + ('{"step": 400, "train/l' if torn else "")
    (path / "metrics.jsonl").write_text(text)
    if status == "finished":
        counts = {"params/total": 1.2 * size, "params/non_embedding": size, "params/matmul": 1.1 * size}
        summary = {"status": status, "seed": 0, "tokens": 1e9 * len(losses), **counts}
        summary["flops_6nd"], summary["flops_causal"] = 6 * 1.2 * size * 3e9, 7 * size * 3e9
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_work_directories_become_one_row_a_run(tmp_path):
    for i, size in enumerate((1e8, 2e8)):
        workdir(tmp_path, f"run{i}", size=size, losses=(3.5, 3.1, 2.9 - 0.1 * i))
    runs = load_runs(tmp_path)
    row = runs.table.iloc[1]
    assert (row["params_total"], row["params_non_embedding"], row["params_matmul"]) == pytest.approx(
        (2.4e8, 2e8, 2.2e8)
    )
    assert (row["tokens"], row["loss"], row["loss_stderr"], row["seed"]) == (3e9, 2.8, 0.002, 0)
    assert row["learning_rate"] == 1e-3 and row["batch_tokens"] == 1e7
    assert (runs.loss_name, runs.params_convention, runs.flops_convention) == ("val/text/loss", "total", "6nd")
    assert len(runs.curves) == 6
    other = load_runs(tmp_path, params="non_embedding", flops="exact")
    assert other.column("params") == pytest.approx([1e8, 2e8])
    assert other.column("flops") == pytest.approx([7 * 1e8 * 3e9, 7 * 2e8 * 3e9])


def test_the_score_of_the_whole_set_goes_before_that_of_a_part(tmp_path):
    for i, whole in enumerate((3.2, None)):
        run = workdir(tmp_path, f"run{i}", size=1e8 * (1 + i))
        summary = json.loads((run / "summary.json").read_text())
        scores = {"val/text/loss": 2.9, "val/text/loss_stderr": 0.02}
        full = {"val_full/text/loss": whole, "val_full/text/loss_stderr": 0.001} if whole else {}
        (run / "summary.json").write_text(json.dumps({**summary, **scores, **full}))
    runs = load_runs(tmp_path)
    assert runs.loss_name == "val/text/loss"
    assert runs.column("loss").tolist() == [3.2, 2.9]
    assert runs.table["loss_stderr"].tolist() == [0.001, 0.02]
    assert runs.curves.groupby("run")["loss"].min().tolist() == [2.9, 2.9]  # a curve is of one set


def test_the_n_of_mixtures_is_what_a_token_passes_through(tmp_path):
    for name, active in (("dense", None), ("mixture", 0.5e8)):
        summary = workdir(tmp_path, name) / "summary.json"
        counts = {} if active is None else {"params/active": active, "flops_6nd": 6 * active * 3e9}
        summary.write_text(json.dumps(json.loads(summary.read_text()) | counts))
    runs = load_runs(tmp_path)
    assert runs.params_convention == "active"
    assert runs.column("params") == pytest.approx([1.2e8, 0.5e8])  # of a dense model that is the total
    assert runs.column("params_total") == pytest.approx([1.2e8, 1.2e8])
    assert load_runs(tmp_path / "mixture", params="total").column("params") == pytest.approx([1.2e8])
    assert load_runs(tmp_path / "dense").params_convention == "total"
    table = pd.DataFrame(
        {"Active Params": [1e8, 2e8], "Total Params": [4e8, 8e8], "tokens": [1e9, 2e9], "loss": [3.0, 2.8]}
    )
    assert load_runs(written(tmp_path, table)).column("params") == pytest.approx([1e8, 2e8])


def test_torn_lines_restarts_and_unfinished_runs(tmp_path):
    workdir(tmp_path, "good", torn=True)
    workdir(tmp_path, "stopped", status="preempted")
    restarted = workdir(tmp_path, "restarted")
    with (restarted / "metrics.jsonl").open("a") as log:
        # The second attempt starts at step 200: the row of step 300 counts no more.
        for line in ({"event": "start", "step": 200}, {"step": 300, "tokens": 3e9, "val/text/loss": 2.7}):
            log.write(json.dumps(line) + "\n")
    runs = load_runs(tmp_path)
    assert dict(zip(runs.table["run"], runs.table["loss"], strict=True)) == {"good": 2.9, "restarted": 2.7}
    assert [(e.reason, e.runs) for e in runs.exclusions] == [("not finished (status unfinished)", ("stopped",))]


def test_branches_are_resampled_with_their_trunk_which_is_no_run_of_its_own(tmp_path, monkeypatch):
    """Unless it decays, as a run does that others branch from before its decay."""
    monkeypatch.chdir(tmp_path)
    constant, decayed = workdir(tmp_path, "constant"), workdir(tmp_path, "decayed")
    log = constant / "metrics.jsonl"
    log.write_text(re.sub(r'"optim/lr": [0-9.e-]+', '"optim/lr": 0.001', log.read_text()))
    for name, origin in (("a", "constant@100"), ("b", f"{constant}@200"), ("c", "decayed@100")):
        workdir(tmp_path, name, train={"seed": 0, "steps": 300, "branch_from": origin})
    runs = load_runs(tmp_path)
    assert [(e.reason, e.runs) for e in runs.exclusions] == [("the trunk of branches, not decayed", ("constant",))]
    trunks = dict(zip(runs.table["run"], runs.table["trunk"], strict=True))
    assert trunks == {"a": str(constant), "b": str(constant), "c": str(decayed), "decayed": str(decayed)}


def test_damage_before_the_last_line_is_refused(tmp_path):
    path = workdir(tmp_path, "run") / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 100', '{"step": 1 00'))
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON object: repair or delete the line"):
        load_runs(tmp_path)


def test_several_validation_sets_need_a_choice(tmp_path):
    log = workdir(tmp_path, "run") / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 300, "val/code/loss": 1.5}) + "\n")
    with pytest.raises(ValueError, match=r"several validation losses \(val/code/loss, val/text/loss\)"):
        load_runs(tmp_path)
    assert load_runs(tmp_path, loss="val/code/loss").column("loss") == pytest.approx([1.5])


# wandb ------------------------------------------------------------------------------------------------------------


CONFIG = {"config": {"data": {"seq_len": 512}, "train": {"seed": 1}}, "data": {"text": "a hash"}, "N": 100_000_000}


class FakeRun:
    """What `wandb.Api().runs()` yields: scan_history drops rows that lack any key, as the real one does."""

    def __init__(self, name, rows, summary, broken=False):
        self.id, self.name, self.config, self.rows, self.broken = name, name, CONFIG, rows, broken
        self.summary, self.lastHistoryStep, self.calls = summary, rows[-1]["_step"], 0

    def scan_history(self, keys):
        self.calls += 1
        return [] if self.broken else [{k: row[k] for k in keys} for row in self.rows if all(k in row for k in keys)]


def fake_run(broken=False):
    rows = [{"_step": i, "tokens": 1e8 * i, "flops": 6e16 * i, "train/loss": 4 - 0.1 * i} for i in range(1, 11)]
    rows[-1]["val/text/loss"] = 2.95
    counts = {"params/total": 1e8, "tokens": 1e9, "flops": 6e17, "flops_6nd": 6e17, "status": "finished"}
    nested = {"train/loss": {"min": 3.0, "last": 3.0}, "val/text/loss": {"min": 2.9, "last": 2.95}}
    return FakeRun("alpha", rows, {**counts, **nested}, broken)


def test_wandb_histories_are_whole_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = fake_run()
    api = SimpleNamespace(runs=lambda project: [run])
    runs = load_runs("wandb:me/project", api=api)
    assert runs.column("loss") == pytest.approx([2.95]) and runs.column("tokens") == pytest.approx([1e9])
    assert runs.sequence_length == 512 and runs.table["config.N"].tolist() == [100_000_000]
    calls = run.calls
    train = load_runs("wandb:me/project", loss="train/loss", api=api)
    assert run.calls == calls and len(train.curves) == 10


def test_an_incomplete_wandb_history_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="wandb returned no rows of train/loss for run alpha"):
        load_runs("wandb:me/project", api=SimpleNamespace(runs=lambda project: [fake_run(broken=True)]))


def wait_until_written(folder, count):
    """`finish` returns before wandb's own process has flushed the file: wait for every exit record."""
    for _ in range(200):
        kinds = [[r.WhichOneof("record_type") for r in wandb_runs._records(p)] for p in wandb_runs.find_offline(folder)
                 if p.stat().st_size > 7]  # fmt: skip
        if sum("exit" in each for each in kinds) == count:
            return
        time.sleep(0.05)
    pytest.fail("wandb has not written its offline files in 10 s")


def test_offline_wandb_runs_are_read_back(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name, loss in (("one", 3.0), ("two", 2.5)):
        settings = wandb.Settings(console="off", x_disable_stats=True)
        config = {"optimizer": {"learning_rate": 1e-3}}
        run = wandb.init(mode="offline", dir=tmp_path, project="p", name=name, config=config, settings=settings)
        for step in (1, 2, 3):
            run.log({"tokens": 1e8 * step, "flops": 1e17 * step, "val/text/loss": loss + 1 / step}, step=step)
        run.summary.update({"params/total": 1e8, "flops_6nd": 3e17 * 0.6, "status": "finished", "tokens": 3e8})
        run.finish()
    wait_until_written(tmp_path, 2)
    runs = load_runs(tmp_path)
    found = dict(zip(runs.table["run"], runs.table["loss"], strict=True))
    assert found == pytest.approx({"one": 3.0 + 1 / 3, "two": 2.5 + 1 / 3})
    assert len(runs.curves) == 6
    # A killed run leaves a torn file: what is whole is read.
    path = next(tmp_path.rglob("*.wandb"))
    path.write_bytes(path.read_bytes()[:-40])
    assert len(load_runs(tmp_path, loss="val/text/loss").table) >= 1


def test_an_offline_file_that_holds_no_run_is_named(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "run-a.wandb").write_bytes(b":W&B\x55\x2d\x00")
    with pytest.raises(ValueError, match=r"run-a\.wandb: holds no run \(7 bytes\)"):
        load_runs(tmp_path)


def test_a_finished_training_run_fills_the_table(tmp_path):
    """The keys that `lmjax train` writes; curves count FLOPs as the table does."""
    run = tmp_path / "small"
    run.mkdir()
    schedule = {"learning_rate": 4e-3, "schedule": {"name": "cosine"}}
    (run / "config.json").write_text(json.dumps({"optimizer": schedule}))
    rows = [{"event": "start", "step": 0}]
    rows += [
        {"step": s, "tokens": 768 * s, "flops": 8e6 * s, "optim/lr": 4e-3, "val/a/loss": 3 - s / 10} for s in (1, 2)
    ]
    rows += [{"event": "end", "status": "finished"}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"status": "finished", "params/total": 1500, "tokens": 1536, "flops_6nd": 13824000, "epochs/a": 1.5}
    (run / "summary.json").write_text(json.dumps({**summary, "flops_causal": 16e6, "val/a/loss": 2.8}))
    runs = load_runs(tmp_path)
    assert runs.table.loc[0, ["schedule", "unique_tokens", "flops_exact"]].tolist() == ["cosine", 1024.0, 16e6]
    assert runs.curves["flops"].tolist() == pytest.approx([6912000.0, 13824000.0])
