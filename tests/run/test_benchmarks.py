"""Benchmarks during training and by the command: the same questions, the same numbers."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmjax import __main__, config
from lmjax.errors import DONE, ConfigError, DataError
from lmjax.evaluate.tasks.registry import BENCHMARKS
from lmjax.record.report import write_report
from lmjax.record.tracking import read_jsonl
from lmjax.run import run

pytestmark = pytest.mark.usefixtures("quick_compilation", "compiled_once")

CONFIG = Path(__file__).parents[1] / "tiny_config.py"
SETTINGS = (
    "train.steps=12",
    "train.sample.prompts=()",
    "train.evaluate_every=6",
    "checkpoint.every=6",
    "model.layers=1",
    "train.evaluations.tasks=('piqa','arithmetic_written')",
    "train.evaluations.limit=9",
    "train.evaluations.shots=0",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of two benchmarks, in the letters of the corpus."""
    directory = tmp_path_factory.mktemp("eval")
    goals = [{"query": f"{c} {d} \n", "choices": [f"{c} a", f"{d} b c"], "gold": n % 2} for n, (c, d) in PAIRS]
    sums = [{"context": f"{c} {d}", "continuation": " a"} for _, (c, d) in PAIRS]
    for name, records in (("piqa", goals), ("arithmetic", sums)):
        (directory / BENCHMARKS[name].file).write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


PAIRS = list(enumerate(zip("abcdefghabcdefgh", "bcdefghacdefghab", strict=True)))


@pytest.fixture(scope="module")
def trained(corpus: Path, data: Path) -> Path:
    cfg = config.load(f"{CONFIG}:{corpus}", [*SETTINGS, f"train.evaluations.data={data}"])
    assert run.run(cfg, corpus / "run", run.Options()) == DONE
    return corpus / "run"


def evaluate(*arguments: Any) -> int:
    parsed = __main__.parse(["evaluate", *map(str, arguments)])
    return parsed.function(parsed)


def asked(capsys: pytest.CaptureFixture, *arguments: Any) -> dict[str, Any]:
    assert evaluate(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_training_answers_what_the_command_does(trained: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    rows = {row["step"]: row for row in read_jsonl(trained / "metrics.jsonl") if "eval/piqa/acc" in row}
    assert list(rows) == [6, 12]
    options = (
        f"--workdir={trained}",
        "--tasks=piqa,arithmetic_written",
        f"--task-data={data}",
        "--limit=9",
        "--shots=0",
    )
    for step, row in rows.items():
        found = asked(capsys, *options, f"--step={step}")
        assert row["data/piqa/digest"] == found["piqa"]["digest"] and found["piqa"]["items"] == 9
        numbers = {
            f"eval/{name}/{metric}": by["all"]["value"]
            for name, of_task in found.items()
            for metric, by in of_task["metrics"].items()
        }
        assert {"eval/piqa/acc_uncond", "eval/piqa/gold_bpb", "eval/arithmetic_written/exact_match"} <= {*numbers}
        assert {key: row[key] for key in numbers} == pytest.approx(numbers, abs=1e-5)
    assert rows[6]["eval/piqa/gold_bpb"] != rows[12]["eval/piqa/gold_bpb"]
    assert json.loads((trained / "summary.json").read_text())["eval/piqa/acc"] == rows[12]["eval/piqa/acc"]
    write_report(trained)
    assert "| step | tokens | piqa/acc | " in (trained / "report.md").read_text()


def test_benchmarks_at_a_pace_of_their_own(trained: Path, corpus: Path, data: Path) -> None:
    """At every third evaluation, and at the end; each as if they were answered at all."""
    settings = [*SETTINGS, f"train.evaluations.data={data}", "train.evaluate_every=2", "train.evaluations.every=6"]
    settings += ["train.steps=14"]
    assert run.run(config.load(f"{CONFIG}:{corpus}", settings), corpus / "paced", run.Options()) == DONE
    rows = {row["step"]: row for row in read_jsonl(corpus / "paced" / "metrics.jsonl") if "val/a/loss" in row}
    assert list(rows) == [2, 4, 6, 8, 10, 12, 14]
    assert [step for step, row in rows.items() if "eval/piqa/acc" in row] == [6, 12, 14]
    assert len({row["data/piqa/digest"] for row in rows.values() if "data/piqa/digest" in row}) == 1


def test_eight_devices_answer_what_one_does(trained: Path, corpus: Path, data: Path) -> None:
    """Benchmarks of a run whose weights and rows are spread over a mesh."""
    settings = [*SETTINGS, f"train.evaluations.data={data}", "train.microbatches=1", "mesh.fsdp=4"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    flags = [f"--config={CONFIG}:{corpus}", f"--workdir={corpus / 'spread'}", *(f"--config.{one}" for one in settings)]
    command = [sys.executable, "-m", "lmjax", "train", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    spread, alone = (read_jsonl(path / "metrics.jsonl") for path in (corpus / "spread", trained))
    compared = 0
    for row, wanted in zip(spread, alone, strict=True):
        numbers = {key: value for key, value in wanted.items() if key.startswith("eval/")}
        assert {key: row[key] for key in numbers} == pytest.approx(numbers, abs=1e-4)
        compared += len(numbers)
    assert compared > 20


def test_a_model_does_not_differ_from_itself(trained: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    options = (f"--workdir={trained}", "--tasks=piqa", f"--task-data={data}", f"--against={trained}")
    found = asked(capsys, *options)["piqa"]
    assert found["against"] == found["metrics"] and found["items"] == len(PAIRS)
    difference = found["difference"]["acc"]["all"]
    assert difference["value"] == difference["stderr"] == 0 and difference["items"] == len(PAIRS)
    assert difference["high"] == -difference["low"] > 0  # so few questions leave room for some
    assert found["mcnemar"]["acc"] == {"first_only": 0, "second_only": 0, "p": 1.0}


def test_fewer_bits_beside_all_of_them(trained: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    """What they cost, in likelihood and question by question; the other run has all of its bits."""
    exact, *small = (
        next(iter(asked(capsys, f"--workdir={trained}", *more).values()))
        for more in ((), ("--weights=bfloat16",), ("--weights=int8",))
    )
    away = [abs(one["loss"] - exact["loss"]) for one in small]
    assert away[0] > 0 and 0 < away[1] < 0.02 * exact["loss"]
    assert {one["digest"] for one in small} == {exact["digest"]}
    assert [one["weights"] for one in (exact, *small)] == [None, "bfloat16", "int8"]
    options = (f"--workdir={trained}", "--tasks=piqa", f"--task-data={data}")
    alone, beside = asked(capsys, *options), asked(capsys, *options, "--weights=int8", f"--against={trained}")
    assert beside["piqa"]["against"] == alone["piqa"]["metrics"] != beside["piqa"]["metrics"]
    with pytest.raises(ConfigError, match="--weights is not read by an evaluation on texts"):
        evaluate(f"--texts={trained / 'config.json'}", "--weights=int8")


def test_two_checkpoints_side_by_side(trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = (f"--workdir={trained}", "--step=6", "--tasks=piqa", f"--task-data={data}", f"--against={trained}")
    assert evaluate(*options, f"--requests={tmp_path / 'said.jsonl'}") == 0
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title == f"{trained}, step 6; other: {trained}, step 12"
    assert head.split()[-2:] == ["McNemar", "p"]
    (bits,) = (row.split() for row in rows if " gold_bpb " in row)
    name, metric, value, _, items, other, _, difference, *interval = bits
    assert (name, metric, items) == ("piqa", "gold_bpb", "16")
    assert float(difference) == pytest.approx(float(value) - float(other), abs=2e-4)
    assert len(interval) == 2  # and no test of right and wrong
    records = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [record["number"] for record in records] == list(range(16))
    assert all(record["task"] == "piqa" and len(record["logprobs"]) == 2 for record in records)
    accuracy = sum(record["scores"]["acc"][0] for record in records) / 16
    (acc,) = (row.split() for row in rows if " acc " in row)
    assert float(acc[2]) == pytest.approx(accuracy, abs=1e-4)


def test_a_page_and_questions_asked_otherwise(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Beside the same questions as they are, which have the numbers that they have alone."""
    options = (f"--workdir={trained}", "--tasks=piqa", f"--task-data={data}")
    alone = asked(capsys, *options)["piqa"]["metrics"]
    found = asked(capsys, *options, "--perturb=upper,reworded", f"--page={tmp_path / 'page.html'}")
    assert list(found) == ["piqa upper", "piqa reworded 1", "piqa reworded 2"]
    for one in found.values():
        assert one["against"] == alone and one["metrics"] != alone
        interval = one["difference"]["gold_bpb"]["all"]
        assert interval["value"] == pytest.approx(
            one["metrics"]["gold_bpb"]["all"]["value"] - alone["gold_bpb"]["all"]["value"]
        )
        assert interval["low"] < interval["value"] < interval["high"]
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>") and "piqa reworded 2" in page and "McNemar p" in page


def test_what_a_run_knows_by_heart(trained: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    """Of each split of its own data, as many prefixes as are asked for, the same every time."""
    options = (f"--workdir={trained}", "--memorized=8:4", "--limit=40")
    found = asked(capsys, *options)
    assert list(found) == [f"{corpus}/{name}.prepared, {split}" for name in "ab" for split in ("train", "valid")]
    assert all(one["items"] == 40 and one["metrics"]["memorized"]["all"]["items"] == 40 for one in found.values())
    assert asked(capsys, *options) == found
    assert asked(capsys, *options, "--seed=5") != found
    with pytest.raises(ConfigError, match="--memorized=30:4 are more tokens than the 32 that the model reads"):
        evaluate(f"--workdir={trained}", "--memorized=30:4")


# What does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("data=nowhere", DataError, r"cannot read nowhere/piqa\.jsonl"),
        ("shots=99", ConfigError, "need more than the 16 questions"),
    ],
)
def test_a_run_does_not_begin_without_its_questions(
    corpus: Path, data: Path, tmp_path: Path, setting: str, error: type, message: str
) -> None:
    settings = [*SETTINGS, f"train.evaluations.data={data}", f"train.evaluations.{setting}"]
    with pytest.raises(error, match=message):
        run.run(config.load(f"{CONFIG}:{corpus}", settings), tmp_path / "run", run.Options())
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_run_does_not_begin_with_what_leaves_no_room(corpus: Path, data: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, f"train.evaluations.data={data}", "data.seq_len=16"]
    with pytest.raises(ConfigError, match="tokens=16 new ones leave no room"):
        run.run(config.load(f"{CONFIG}:{corpus}", settings), tmp_path / "run", run.Options())


def test_benchmarks_are_answered_where_the_run_evaluates(corpus: Path) -> None:
    for others in (["train.evaluate_every=4"], ["train.evaluate_every=None"]):
        with pytest.raises(ConfigError, match=r"evaluations\.every=6 is no multiple of evaluate_every"):
            config.load(f"{CONFIG}:{corpus}", [*SETTINGS, "train.evaluations.every=6", *others])


def test_two_runs_are_compared_on_the_same_rows(trained: Path, capsys: pytest.CaptureFixture) -> None:
    """What makes a row hard for both counts for nothing: the error of the difference is below those of the two."""
    half = f"--workdir={trained}", "--step=6"
    beside, alone = asked(capsys, *half, f"--against={trained}"), asked(capsys, f"--workdir={trained}")
    for path, whole in alone.items():
        one, other, less = beside[path], beside[path]["against"], beside[path]["difference"]["loss"]
        assert other == {"workdir": str(trained)} | {name: whole[name] for name in other if name != "workdir"}
        assert less["value"] == pytest.approx(one["loss"] - whole["loss"], abs=1e-9)
        assert 0 < less["stderr"] < 0.8 * math.hypot(one["loss_stderr"], whole["loss_stderr"])
        assert less["low"] < less["value"] < less["high"]


def test_the_other_run_reads_the_rows_of_the_first(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The same weights, in a run whose documents were kept apart and whose rows were shorter."""
    shutil.copytree(trained, tmp_path / "other")
    settings = json.loads((tmp_path / "other" / "config.json").read_text())
    settings["data"] |= {"documents": "separate", "seq_len": settings["data"]["seq_len"] // 2}
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings))
    assert evaluate(f"--workdir={trained}", f"--against={tmp_path / 'other'}") == 0
    assert "difference     +0.000000 +- 0.000000 nats per token" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="gone is no work directory"):
        evaluate(f"--workdir={trained}", f"--against={tmp_path / 'gone'}")


def test_names_are_those_of_benchmarks(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.evaluations\.tasks\.0: there is no 'piqqa' \(did you mean 'piqa'"):
        config.load(f"{CONFIG}:{corpus}", ["train.evaluations.tasks=('piqqa',)"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=piqa"], "--tasks needs --task-data=DIR"),
        (["--tasks=piqqa", "--task-data=x"], r"--tasks\.0: there is no 'piqqa'"),
        (["--tasks=piqa,", "--task-data=x"], "not names by commas"),
        (["--tasks=piqa", "--task-data=x", "--data=y"], "--data is not read by an evaluation on benchmarks"),
        (["--limit=3"], "--limit is not read by an evaluation on prepared data"),
        (["--against=x", "--harness=y"], "--against is not read by an evaluation on the harness's tasks"),
        (["--tasks=piqa", "--task-data=x", "--harness=y"], "--harness is not read by an evaluation on benchmarks"),
        (["--tasks=pears:x.jsonl", "--task-data=x"], r"--tasks\.0: there is no 'pears' \(did you mean 'pairs'"),
        (["--tasks=pairs:", "--task-data=x"], r"'pairs:' names no file; write pairs:FILE"),
        (["--tasks=piqa", "--task-data=x", "--perturb=lower", "--against=y"], "leave out the one"),
        (["--texts=x"], "--workdir is not read by an evaluation on texts"),
        (["--memorized=8"], "argument --memorized"),
        (["--tasks=piqa", "--task-data=x", "--page=nowhere/x.html"], "--page=nowhere/x.html: there is no such folder"),
    ],
)
def test_flags_that_do_not_go_together(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate("--workdir=nowhere", *arguments)
