"""How an attempt ends, what it leaves behind, and what is counted over several of them."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmjax import config
from lmjax.errors import DONE, PREEMPTED, CheckpointError, ConfigError, NumericalError
from lmjax.process import faults as fault_hooks
from lmjax.process import signals
from lmjax.record import checkpoint, inspect, seal
from lmjax.record.ledger import read_ledger
from lmjax.record.tracking import read_events, read_jsonl
from lmjax.run import progress, run, workdir

pytestmark = pytest.mark.usefixtures("quick_compilation", "compiled_once")

CONFIG = Path(__file__).parents[1] / "tiny_config.py"
SETTINGS = (
    "train.steps=12",
    "train.sample.prompts=()",
    "train.evaluate_every=6",
    "checkpoint.every=4",
    "model.layers=1",
)
STEPS, BATCH, T = 12, 8, 32
AS_IT_IS = run.Options()
ALLOWED = run.Options(allow_config_change=True, allow_data_change=True)

Train = Callable[..., int]


@pytest.fixture
def train(corpus: Path, monkeypatch: Any) -> Train:
    """Runs the train command here; `faults` are as in LMJAX_FAULTS."""

    def attempt(directory: Path, *settings: str, faults: str = "", options: run.Options = AS_IT_IS) -> int:
        monkeypatch.setenv("LMJAX_FAULTS", faults)
        monkeypatch.setattr(fault_hooks, "_calls", {})
        return run.run(config.load(f"{CONFIG}:{corpus}", [*SETTINGS, *settings]), directory, options)

    return attempt


@pytest.fixture(scope="module")
def finished(corpus: Path) -> Path:
    """A run that was never interrupted."""
    directory = corpus / "finished"
    assert run.run(config.load(f"{CONFIG}:{corpus}", SETTINGS), directory, run.Options()) == DONE
    return directory


@pytest.fixture
def slow_seals(monkeypatch: Any) -> None:
    write = seal.write
    monkeypatch.setattr(seal, "write", lambda *args: (time.sleep(1.0), write(*args)))


def sealed(directory: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in directory.glob(f"checkpoints/*/{seal.MANIFEST}"))


def statuses(directory: Path) -> list[str]:
    return [event["status"] for event in read_events(directory / "metrics.jsonl") if event["event"] == "end"]


def losses(directory: Path) -> dict[int, dict[str, float]]:
    rows = read_jsonl(directory / "metrics.jsonl")
    return {row["step"]: {key: row[key] for key in row if key.endswith("/loss")} for row in rows}


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


# Saves ----------------------------------------------------------------------------------------------------------------


def test_a_failed_save_ends_the_run_before_the_next_one(train: Train, tmp_path: Path) -> None:
    settings = ("train.steps=200", "checkpoint.every=100", "train.evaluate_every=None", "train.log_every=100")
    with pytest.raises(CheckpointError, match=r"100 was not saved: .*No space left"):
        train(tmp_path / "run", *settings, faults="disk_full@checkpoint.write:1,pause@step:150")
    assert 100 <= max(entry.step for entry in read_ledger(tmp_path / "run" / "ledger.jsonl")) < 200
    assert statuses(tmp_path / "run") == ["failed"]


@pytest.mark.usefixtures("slow_seals")
@pytest.mark.parametrize(
    ("faults", "error", "status"),
    [
        ("nan_grad@step:5,nan_grad@step:6", NumericalError, "diverged"),
        pytest.param("raise@step:5", RuntimeError, "failed", marks=pytest.mark.slow),
    ],
)
def test_an_error_does_not_cost_the_save_in_flight(
    train: Train, tmp_path: Path, faults: str, error: type[Exception], status: str
) -> None:
    with pytest.raises(error):
        train(tmp_path / "run", "train.max_skipped_in_a_row=1", faults=faults)
    assert sealed(tmp_path / "run") == [4]
    assert statuses(tmp_path / "run") == [status]


def test_a_last_save_that_fails_does_not_finish_a_run(train: Train, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="12 was not saved"):
        train(tmp_path / "run", faults="disk_full@checkpoint.write:3")
    assert statuses(tmp_path / "run") == ["failed"]
    assert not (tmp_path / "run" / "summary.json").exists()


# The average of the weights -------------------------------------------------------------------------------------------


def test_an_average_is_kept_beside_the_same_weights(with_xla_as_it_is: Callable[..., None]) -> None:
    """To the bit with XLA as users have it; as the tests have it, it rounds by what else a step computes."""
    with_xla_as_it_is(Path(__file__).parent / "average_bits.py")


# Signals --------------------------------------------------------------------------------------------------------------


# Of the two sets there are two batches at step 6.
@pytest.mark.parametrize(("batch", "step"), [(1, 6), pytest.param(3, 12, marks=pytest.mark.slow)])
def test_a_signal_stops_an_evaluation(train: Train, finished: Path, tmp_path: Path, batch: int, step: int) -> None:
    """The step is saved at once and nothing half evaluated is logged; then the run goes on as if nothing had been: it
    begins with the evaluation that it owes."""
    directory, batches = tmp_path / "run", ("train.evaluate_batches=1", "train.evaluate_batch=512")
    assert train(directory, *batches, "train.sample.prompts=('a',)", faults=f"terminate@evaluation.batch:{batch}") == 75
    assert sealed(directory)[-1] == step
    assert not any(name.startswith("val/") for name in losses(directory).get(step, {}))
    assert not (directory / "samples").exists()
    assert statuses(directory) == ["preempted"]
    assert train(directory, *batches, "train.sample.prompts=('a',)") == DONE
    for evaluated in (6, 12):
        assert losses(directory)[evaluated] == pytest.approx(losses(finished)[evaluated], rel=1e-6)
    assert (directory / "samples" / "12.txt").exists()


def test_a_signal_before_the_first_step_saves_nothing(train: Train, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(signals.Preemption, "requested", True)
    assert train(tmp_path / "run") == PREEMPTED
    assert sealed(tmp_path / "run") == [] and statuses(tmp_path / "run") == ["preempted"]


# Where nothing can be appended to -------------------------------------------------------------------------------------


def test_in_a_bucket_a_kill_costs_neither_metrics_nor_the_ledger(
    train: Train, finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """What lies there when the second save is about to be sealed is what a kill at that moment leaves."""
    monkeypatch.setattr("lmjax.record.jsonl.is_remote", lambda path: True)
    left, fault, save = tmp_path / "left", fault_hooks.fault, checkpoint.Checkpoints.save

    def save_and_wait(checkpoints: Any, *args: Any, **kwargs: Any) -> None:
        save(checkpoints, *args, **kwargs)
        checkpoints.wait()  # a directory that is copied must not be written meanwhile

    def watch(site: str) -> str | None:
        if site == "checkpoint.before_seal" and (tmp_path / "run" / "checkpoints" / "8").exists() and not left.exists():
            shutil.copytree(tmp_path / "run", left)
        return fault(site)

    monkeypatch.setattr(checkpoint, "fault", watch)
    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_and_wait)
    assert train(tmp_path / "run") == DONE
    assert sealed(left) == [4] and sorted(losses(left))[:8] == list(range(1, 9))
    before = len(read_ledger(left / "ledger.jsonl"))
    assert before >= 8
    assert train(left) == DONE
    assert losses(left) == losses(finished)
    assert [entry.attempt for entry in read_ledger(left / "ledger.jsonl")] == [0] * before + [1] * 8
    assert workdir.verify(left) == []


def test_attempts_are_numbered_from_whatever_an_earlier_one_left(finished: Path, tmp_path: Path) -> None:
    assert workdir.next_attempt(tmp_path) == 0
    for name in ("ledger.jsonl", "metrics.jsonl"):
        shutil.copy(finished / name, tmp_path)
        assert workdir.next_attempt(tmp_path) == 1
        (tmp_path / name).unlink()


# Counts over changes --------------------------------------------------------------------------------------------------


def test_what_was_counted_stays_counted(train: Train, finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert train(directory, faults="terminate@step:6") == PREEMPTED
    assert train(directory, "data.seq_len=16", faults="terminate@step:8", options=ALLOWED) == PREEMPTED
    assert train(directory, "data.seq_len=16", "train.batch=16", options=ALLOWED) == DONE
    tokens = BATCH * (6 * T + 2 * T // 2 + 4 * 2 * T // 2)
    found, whole = summary(directory), summary(finished)
    assert found["tokens"] == tokens == read_jsonl(directory / "metrics.jsonl")[-1]["tokens"]
    assert found["flops_6nd"] == tokens * whole["flops_6nd"] // whole["tokens"]
    for name in ("flops_causal", "flops_full"):  # attention costs less in shorter sequences
        assert whole[name] // 2 < found[name] < tokens * whole[name] // whole["tokens"]
    assert read_jsonl(directory / "metrics.jsonl")[-1]["flops"] == found["flops_causal"]
    assert [row["tokens"] for row in read_jsonl(directory / "metrics.jsonl")[:6]] == [
        BATCH * T * n for n in range(1, 7)
    ]
    for name in ("epochs/a", "epochs/b"):
        assert found[name] == pytest.approx(whole[name] * tokens / whole["tokens"], rel=0.1)
    assert f"{tokens:,} | {tokens:,}" in (directory / "report.md").read_text()
    assert workdir.verify(directory) == []


def test_an_older_checkpoint_counts_as_it_did(train: Train, finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    save = checkpoint.Checkpoints.save

    def without(self: Any, step: int, state: Any, meta: dict[str, Any], **rest: Any) -> None:
        old = {name: meta[name] for name in ("data", "config", "tokens", "flops")}
        save(self, step, state, old, **rest)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", without)
    assert train(tmp_path / "run", faults="terminate@step:6") == PREEMPTED
    assert train(tmp_path / "run") == DONE
    assert summary(tmp_path / "run") == summary(finished)


@pytest.mark.parametrize("change", ["train.batch=16", pytest.param("data.seed=1", marks=pytest.mark.slow)])
def test_a_change_across_a_crash_still_verifies(train: Train, tmp_path: Path, change: str) -> None:
    with pytest.raises(RuntimeError, match="injected"):
        train(tmp_path / "run", faults="raise@step:7")
    assert train(tmp_path / "run", change, options=ALLOWED) == DONE
    steps = [entry.step for entry in read_ledger(tmp_path / "run" / "ledger.jsonl")]
    assert steps[6:9] == [7, 5, 6]  # some were done again, otherwise
    assert workdir.verify(tmp_path / "run") == []


def test_fewer_steps_than_were_done_are_refused(train: Train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", faults="terminate@step:7") == PREEMPTED
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"train\.steps=6 is below step 7 of the newest checkpoint"):
        train(tmp_path / "run", "train.steps=6", options=ALLOWED)
    assert sealed(tmp_path / "run") == [4, 7] and (tmp_path / "run" / "config.json").read_text() == before
    assert train(tmp_path / "run", "train.steps=7", options=ALLOWED) == DONE


# What a finished run has ----------------------------------------------------------------------------------------------


def test_a_report_that_a_kill_prevented_is_written(train: Train, finished: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "report.md").unlink()
    assert train(tmp_path / "run") == DONE
    assert "is finished after 12 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.md").read_text().count("\n") > 20


def test_a_finished_run_without_its_last_checkpoint_does_its_last_steps_again(
    train: Train, finished: Path, tmp_path: Path, caplog: Any
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    assert train(tmp_path / "run") == DONE
    assert "is finished after 12 steps, but that checkpoint is gone" in caplog.text
    assert losses(tmp_path / "run") == losses(finished) and sealed(tmp_path / "run")[-1] == 12


def test_a_finished_run_without_checkpoints_is_an_error(train: Train, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="there is no sealed checkpoint"):
        train(tmp_path / "run")


@pytest.mark.slow
def test_a_finished_run_whose_checkpoint_is_damaged_does_its_last_steps_again(
    train: Train, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "12" / "state" / "_METADATA").write_text("{}")
    assert train(tmp_path / "run") == DONE
    hashes = [inspect.inspect(path, hashes=True)["hashes"] for path in (tmp_path / "run", finished)]
    assert hashes[0] == hashes[1]


def test_text_that_is_read_too_often_is_named(train: Train, tmp_path: Path, caplog: Any) -> None:
    assert train(tmp_path / "run", "train.batch=256", "data.sources.a.tokens=33") == DONE
    assert "data source a is read 128 times" in caplog.text and "data source b" not in caplog.text


def test_how_often_text_is_read_counts_steps_of_another_batch(train: Train, tmp_path: Path, caplog: Any) -> None:
    few = ("train.batch=256", "data.sources.a.tokens=33", "checkpoint.every=2")
    assert train(tmp_path / "run", *few, faults="terminate@step:4") == PREEMPTED
    caplog.clear()
    assert train(tmp_path / "run", "data.sources.a.tokens=33", options=ALLOWED) == DONE
    (told,) = re.findall(r"data source a is read (\d+) times", caplog.text)
    assert int(told) == round(summary(tmp_path / "run")["epochs/a"])


@pytest.mark.parametrize("settings", [(), ("train.evaluate_batches=1",)])
def test_a_run_whose_evaluations_were_of_other_batches_says_so(
    train: Train, tmp_path: Path, settings: tuple[str, ...], monkeypatch: Any, caplog: Any
) -> None:
    meta = progress.Progress.meta
    older = {"drawn_evaluations": False}
    monkeypatch.setattr(progress.Progress, "meta", lambda self, step: meta(self, step) | older)
    assert train(tmp_path / "run", *settings, faults="terminate@step:4") == PREEMPTED
    assert train(tmp_path / "run", *settings) == DONE
    assert ("val/ does not compare with what it was before step" in caplog.text) == bool(settings)


def test_the_summary_is_json_where_one_row_has_no_standard_error(train: Train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "train.evaluate_batches=1", "train.evaluate_batch=1") == DONE
    text = (tmp_path / "run" / "summary.json").read_text()
    numbers = json.loads(text, parse_constant=pytest.fail)
    assert numbers["val/a/loss_stderr"] is None and numbers["val_full/a/loss_stderr"] > 0


def test_a_baseline_without_validation_text_is_left_out(
    train: Train, corpus: Path, tmp_path: Path, caplog: Any
) -> None:
    shutil.copytree(corpus / "a", tmp_path / "a")
    recipe = "data.sources.a.prepare."
    settings = (
        f"data.sources.a.path={tmp_path / 'prepared'}",
        f"{recipe}inputs=('{tmp_path}/a/*.txt',)",
        f"{recipe}valid_fraction=0.0",
        "train.compression_baseline=True",
    )
    assert train(tmp_path / "run", *settings) == DONE
    assert "train.compression_baseline is left out for a" in caplog.text
    assert "val_full/b/xz_bpb" in summary(tmp_path / "run")
