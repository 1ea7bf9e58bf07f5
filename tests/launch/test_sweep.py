"""A sweep from its cells to their end, on this machine."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.records import choose_loss, table_of
from analysis.sources import read_records
from launch import manifest, page, price, status
from launch.__main__ import main
from launch.engines import ENGINES, local
from launch.job import Hardware, Job, dns_name
from launch.manifest import Manifest
from launch.sweep import entries, joined
from lmjax.cells import load_cells
from lmjax.errors import PREEMPTED, ConfigError, LmjaxError

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]
TINY = f"{ROOT}/tests/tiny_config.py"
SHORT = [
    "--config.train.steps=20",
    "--config.checkpoint.every=5",
    "--config.train.evaluate_every=None",
    "--config.train.sample.prompts=()",
]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def sweep(corpus: Path, out: Path, cells: list[dict[str, Any]], *flags: str) -> list[str]:
    listed = out.parent / f"{out.name}-cells.json"
    listed.write_text(json.dumps(cells))
    return ["sweep", f"{TINY}:{corpus}", f"--cells={listed}", f"--out={out}", *SHORT, *flags]


def finals(out: Path) -> list[dict[str, Any]]:
    """What the cells came to, without what depends on when they ran."""
    found = [json.loads((out / "cells" / f"{index:04d}" / "summary.json").read_text()) for index in range(2)]
    return [{key: value for key, value in one.items() if not key.startswith("perf/")} for one in found]


SEEDS = [{"train.seed": 0}, {"train.seed": 1}]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two cells that nothing disturbed."""
    out = tmp_path_factory.mktemp("trained") / "sweep"
    done = launch(*sweep(corpus, out, SEEDS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 done" in done.stdout
    return out


def test_the_same_command_again_starts_nothing(corpus: Path, trained: Path) -> None:
    before = {path: path.stat().st_mtime for path in trained.rglob("*.jsonl")}
    again = launch(*sweep(corpus, trained, SEEDS))
    assert again.returncode == 0 and "2 of 2 done" in again.stdout
    assert {path: path.stat().st_mtime for path in trained.rglob("*.jsonl")} == before


def test_status_logs_and_page_tell_of_it_without_jax(trained: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['launch', *sys.argv[1:]]\n"
        "try: runpy.run_module('launch', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", "--json", str(trained)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.endswith("0 False\n"), done.stderr
    rows = json.loads(done.stdout.rpartition("]")[0] + "]")
    assert [(row["state"], row["step"], row["attempts"]) for row in rows] == [("done", 20, 1)] * 2
    assert rows[0]["loss"] == finals(trained)[0][rows[0]["loss_name"]]
    assert "report:" in launch("logs", str(trained), "1").stdout
    assert launch("logs", str(trained), "2").returncode == 2


def test_kills_of_launcher_and_cells_cost_nothing(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """SIGKILL for a cell, then for the launcher, whose cells go with it: the same command ends with the same bits."""
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "launch", *sweep(corpus, out, SEEDS)]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = wait_for(lambda: running(out, at_least=6))
    os.kill(first.pid, signal.SIGKILL)
    assert first.pid is not None
    wait_for(lambda: gone(first.pid))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(row.state == "running" for row in status.rows(out)))
    assert launch("status", str(out)).returncode == 1
    done = launch(*sweep(corpus, out, SEEDS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert finals(out) == finals(trained)


@pytest.mark.slow
def test_a_full_disk_is_told_and_costs_nothing(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    monkeypatch.setenv("LMJAX_FAULTS", "disk_full@checkpoint.write:2")
    assert launch(*sweep(corpus, out, SEEDS)).returncode == 1
    assert all("exit code 4" in row.why and "No space left" in row.why for row in status.rows(out))
    monkeypatch.delenv("LMJAX_FAULTS")
    assert launch(*sweep(corpus, out, SEEDS)).returncode == 0
    assert finals(out) == finals(trained)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come about")


def running(out: Path, at_least: int) -> status.Row | None:
    if not (out / manifest.FILE).exists():
        return None
    return next((row for row in status.rows(out) if row.state == "running" and row.step >= at_least), None)


def gone(pid: int | None) -> bool:
    return pid is not None and not Path(f"/proc/{pid}").exists()


def test_stop_has_cells_save_and_the_same_command_goes_on(corpus: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "launch", *sweep(corpus, out, SEEDS, "--jobs=1")]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: running(out, at_least=6))
    assert main(["stop", str(out)]) == 0
    assert launcher.wait(timeout=120) == PREEMPTED
    assert [row.state for row in status.rows(out)] in (["preempted", "waiting"], ["waiting", "preempted"])
    assert not (out / local.LAUNCHER).exists() and main(["stop", str(out)]) == 0
    assert launch(*sweep(corpus, out, SEEDS)).returncode == 0
    assert finals(out) == finals(trained)


def test_a_launcher_that_is_gone_is_not_signalled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed, it leaves its number behind, which may be another process's by now."""
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / local.LAUNCHER).write_text(json.dumps([socket.gethostname(), other.pid]))
        assert local.stop("first", str(tmp_path), []) == 0
        assert "is gone" in capsys.readouterr().out
        other.kill()
        assert other.wait() == -signal.SIGKILL  # a SIGTERM would have come first


def test_a_cell_that_fails_is_told_and_the_others_go_on(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    cells = [{"train.seed": 0}, {"optimizer.learning_rate": 1e30, "train.max_skipped_in_a_row": 2}]
    done = launch(*sweep(corpus, out, cells))
    assert done.returncode == 1
    rows = status.rows(out)
    assert [row.state for row in rows] == ["done", "failed"]
    assert rows[1].why.startswith("exit code 5: lmjax: error: ") and rows[1].why in launch("status", str(out)).stdout


def test_another_sweep_is_refused_and_extended_when_asked(corpus: Path, trained: Path) -> None:
    other = [{"train.seed": 0}, {"train.seed": 7}]
    refused = launch(*sweep(corpus, trained, other, "--dry-run"))
    assert refused.returncode == 2 and "holds another sweep: cell 1" in refused.stderr
    assert launch(*sweep(corpus, trained, [*SEEDS, other[1]], "--dry-run", "--extend")).returncode == 0
    assert len(manifest.read(trained).cells) == 2


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--only=2"], "there is no such cell; they go from 0 to 1"),
        (["--only=x"], "write indices"),
        (["--accelerator=v5e-3"], "--accelerator=v5e-3"),
        (["--accelerator=v5e-16"], "cell 0: mesh.data=16 does not divide train.batch"),
        (["--config.train.stepz=1"], "unknown key 'stepz'"),
        (["--nodes=0"], "--nodes=0"),
        (["--out=s3://mine/first"], "Orbax writes checkpoints to disks and gs://, not to s3://"),
        (["--jobs=0"], "--jobs=0 must be at least 1"),
        (["--share-of-peak=2"], "--share-of-peak"),
    ],
)
def test_mistakes_are_named_and_write_nothing(corpus: Path, tmp_path: Path, flags: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        main(sweep(corpus, tmp_path / "new", SEEDS, *flags))
    assert not (tmp_path / "new").exists()


def test_money_is_spent_after_a_yes(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="say --yes"):
        main(sweep(corpus, tmp_path / "new", SEEDS, "--accelerator=v5e-4"))
    assert not (tmp_path / "new").exists()


# The parts ------------------------------------------------------------------------------------------------------------


def planned(corpus: Path, cells: list[dict[str, Any]], tmp_path: Path) -> list[manifest.Entry]:
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    found = load_cells(f"{TINY}:{corpus}", str(tmp_path / "cells.json"))
    on = price.accelerator(None, share_of_peak=0.4, dollars=None)
    return entries(found, price.price_all(found, on))


def manifest_of(cells: list[manifest.Entry]) -> Manifest:
    return Manifest(
        name="s", config="c.py", common=[], engine="local", accelerator=None, nodes=1, spot=False, prices="",
        created="", lmjax="", code="", data={}, cells=cells,
    )  # fmt: skip


def test_a_manifest_reads_back_and_a_later_one_is_refused(corpus: Path, tmp_path: Path) -> None:
    written = manifest_of(planned(corpus, SEEDS, tmp_path))
    manifest.write(tmp_path, written)
    assert manifest.read(tmp_path) == written
    tree = json.loads((tmp_path / manifest.FILE).read_text()) | {"format": 2}
    (tmp_path / manifest.FILE).write_text(json.dumps(tree))
    with pytest.raises(LmjaxError, match="in format 2, this is lmjax"):
        manifest.read(tmp_path)
    (tmp_path / manifest.FILE).write_text("[]")
    with pytest.raises(LmjaxError, match="not a readable sweep"):
        manifest.read(tmp_path)


def test_added_cells_come_after_the_old_ones(corpus: Path, tmp_path: Path) -> None:
    old = manifest_of(planned(corpus, SEEDS, tmp_path))
    wanted = planned(corpus, [{"train.seed": 2}, {"train.seed": 1}], tmp_path)
    extended = joined(old, wanted, ROOT, extend=True)
    assert [(entry.index, entry.overrides["train.seed"]) for entry in extended] == [(0, 0), (1, 1), (2, 2)]


def test_prices_are_those_of_the_declaration(corpus: Path, tmp_path: Path) -> None:
    """Memory against the state that the run itself would hold; FLOPs and dollars scale with steps and devices."""
    import jax

    from lmjax.run import assemble
    from lmjax.run.dry_run import with_known_vocab
    from lmjax.tasks.pretrain import without_data

    cells = [{"optimizer.name": name, "train.steps": 100} for name in ("adamw", "muon", "lion", "sgd", "adafactor")]
    cells += [{"train.steps": 200, "optimizer.name": "adamw", "train.batch": 16, "train.microbatches": 1}]
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    found = load_cells(f"{TINY}:{corpus}", str(tmp_path / "cells.json"))
    on = price.accelerator("v5e-4", share_of_peak=0.5, dollars=None)
    prices = price.price_all(found, on)
    alone = price.price_all(found, price.accelerator(None, share_of_peak=0.5, dollars=None))
    for cell, one in zip(found, alone, strict=True):
        state = assemble.abstract_state(assemble.assemble(without_data(with_known_vocab(cell.cfg)), jax.devices()[:1]))
        exact = assemble.device_bytes((state, state.params))
        assert one.state_bytes == pytest.approx(exact, rel=0.02)
    assert prices[5].flops == 4 * prices[0].flops and prices[0].tokens == 100 * 8 * 32
    assert prices[0].hours and prices[0].dollars == pytest.approx(prices[0].hours * 4 * 1.20)
    twice = price.accelerator("v5e-4", share_of_peak=0.25, dollars=2.40)
    assert price.price_all(found, twice)[0].dollars == pytest.approx(4 * prices[0].dollars)


def pool(tmp_path: Path, commands: list[list[str]], retries: int = 0) -> int:
    (tmp_path / "cells").mkdir(exist_ok=True)
    jobs = [Job(index, f"j{index}", tuple(command), {}, 1.0) for index, command in enumerate(commands)]
    return local.submit("s", str(tmp_path), jobs, Hardware(), Namespace(jobs=2, retries=retries))


@pytest.mark.parametrize(("code", "tries"), [(0, 1), (2, 1), (5, 1), (6, 3), (75, 3), (137, 3)])
def test_what_may_go_on_is_tried_again(corpus: Path, tmp_path: Path, code: int, tries: int) -> None:
    manifest.write(tmp_path, manifest_of(planned(corpus, [{}], tmp_path)))
    count = f"import sys; open({str(tmp_path / 'tries')!r}, 'a').write('x'); sys.exit({code})"
    assert pool(tmp_path, [[sys.executable, "-c", count]], retries=2) == (1 if code else 0)
    assert (tmp_path / "tries").read_text() == "x" * tries


def test_a_stop_asks_each_cell_once(corpus: Path, tmp_path: Path) -> None:
    """However long it takes to save: a second signal has a training leave at once."""
    manifest.write(tmp_path, manifest_of(planned(corpus, SEEDS, tmp_path)))
    save = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1], "a").write("x"))
os.kill(os.getppid(), signal.SIGTERM)
end = time.monotonic() + 2
while time.monotonic() < end:
    time.sleep(0.1)
sys.exit(75)
"""
    assert pool(tmp_path, [[sys.executable, "-c", save, str(tmp_path / "signals")]]) == 75
    assert (tmp_path / "signals").read_text() == "x"


def test_cells_share_out_the_cores(corpus: Path, tmp_path: Path) -> None:
    manifest.write(tmp_path, manifest_of(planned(corpus, SEEDS, tmp_path)))
    tell = "import os, sys, time; time.sleep(0.5); open(sys.argv[1], 'w').write(str(os.sched_getaffinity(0)))"
    assert pool(tmp_path, [[sys.executable, "-c", tell, str(tmp_path / name)] for name in "ab"]) == 0
    shares = [set(map(int, (tmp_path / name).read_text().strip("{}").split(","))) for name in "ab"]
    assert shares[0] | shares[1] == os.sched_getaffinity(0)
    assert len(os.sched_getaffinity(0)) == 1 or not shares[0] & shares[1]


def test_every_engine_is_one() -> None:
    for engine in ENGINES.values():
        assert all(callable(getattr(engine, name)) for name in ("add_arguments", "render", "submit", "stop"))


def test_names_suit_clusters() -> None:
    assert dns_name("My sweep_1", "7") == "my-sweep-1-7"
    assert dns_name("1e19") == "s-1e19" and len(dns_name("x" * 80)) == 40


# What the files say ---------------------------------------------------------------------------------------------------


def lines(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


STARTED = {"event": "started", "time": 1000.0, "host": "elsewhere", "pid": 1}
LOGGED = {"step": 7, "time": 1900.0, "tokens": 70, "flops": 700, "train/loss": 5.5, "perf/step_time": 2.0}


@pytest.mark.parametrize(
    ("notes", "metrics", "state", "why"),
    [
        ([], [], "waiting", ""),
        ([STARTED], [LOGGED], "silent", "nothing heard"),
        ([STARTED | {"time": 4e9}], [LOGGED], "running", ""),
        ([STARTED, {"event": "ended", "time": 2000.0, "code": 75, "last": "x"}], [LOGGED], "preempted", "saved"),
        ([STARTED, {"event": "ended", "time": 2000.0, "code": 4, "last": "no space"}], [LOGGED], "failed", "no space"),
        ([STARTED, {"event": "ended", "time": 2000.0, "code": 137, "last": ""}], [LOGGED], "killed", "signal 9"),
        ([STARTED, {"event": "ended", "time": 2000.0, "code": 0, "last": ""}], [LOGGED], "failed", "no summary"),
        ([STARTED | {"host": os.uname().nodename, "pid": 2**22 + 1}], [LOGGED], "killed", "the process is gone"),
    ],
)
def test_states_are_read_from_files(
    corpus: Path, tmp_path: Path, notes: list[Any], metrics: list[Any], state: str, why: str
) -> None:
    (entry,) = planned(corpus, [{}], tmp_path)
    manifest.write(tmp_path, manifest_of([entry]))
    lines(tmp_path / entry.attempts, *notes)
    lines(tmp_path / entry.workdir / "metrics.jsonl", *metrics)
    (row,) = status.rows(tmp_path)
    assert row.state == state and why in row.why
    if metrics:
        assert (row.step, row.loss, row.loss_name) == (7, 5.5, "train/loss")
        assert row.spent_hours * 3600 == pytest.approx(900 if len(notes) == 1 else 1000, abs=1) or state == "running"


def test_a_torn_line_is_left_out(corpus: Path, tmp_path: Path) -> None:
    (entry,) = planned(corpus, [{}], tmp_path)
    manifest.write(tmp_path, manifest_of([entry]))
    path = tmp_path / entry.workdir / "metrics.jsonl"
    lines(path, LOGGED)
    path.write_text(path.read_text() + '{"step": 8, "train/lo')
    assert status.rows(tmp_path)[0].step == 7


def test_the_page_holds_curves_and_budgets(corpus: Path, tmp_path: Path) -> None:
    cells = planned(corpus, [{"train.steps": 100}, {"train.steps": 105}, {"train.steps": 900}], tmp_path)
    cells = [dataclasses.replace(entry, name="</script><b>") for entry in cells]
    sweep = manifest_of(cells)
    manifest.write(tmp_path, sweep)
    logged = [LOGGED | {"step": step, "tokens": 10 * step, "train/loss": 1 / step} for step in range(1, 1001)]
    lines(tmp_path / cells[0].workdir / "metrics.jsonl", *logged, LOGGED | {"step": 1, "train/loss": 2.0})
    path = page.write(tmp_path, sweep, status.rows(tmp_path))
    text = Path(path).read_text()
    assert text.count("</script>") == 1
    data = json.loads(text.split("const data = ")[1].split(";\n")[0])
    budgets = [cell["budget"] for cell in data["cells"]]
    assert budgets[0] == budgets[1] < budgets[2]
    curve = data["cells"][0]["curve"]
    assert len(curve) == 100 and curve[-1][0] == 10_000
    assert curve[0][2] == pytest.approx((2.0 + sum(1 / step for step in range(2, 11))) / 10)


def test_cells_are_compared_by_their_names_and_by_their_sweep(trained: Path) -> None:
    records = read_records([str(trained)], group=trained.name)
    assert [record.name for record in records] == ["0 seed=0", "1 seed=1"]
    assert read_records([str(trained.parent)], group=trained.name)
    with pytest.raises(ValueError, match="no run is of the group other"):
        read_records([str(trained)], group="other")


def test_cells_that_did_not_start_are_left_out_with_the_reason(corpus: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep" / "cells" / "0001")
    records = read_records([str(tmp_path / "sweep")])
    table = table_of(records, choose_loss(records, "val/a/loss"))
    assert list(table["status"]) == ["finished", "unfinished"]


@pytest.mark.parametrize(
    ("losses", "note"),
    [([1.0, 2.0, 3.0], "try lower"), ([3.0, 2.0, 1.0], "try higher"), ([2.0, 1.0, 3.0], ""), ([1.0, 2.0, None], "")],
)
def test_a_best_rate_at_the_edge_of_a_bracket_is_noted(
    corpus: Path, tmp_path: Path, losses: list[float | None], note: str
) -> None:
    (tmp_path / "cells.json").write_text("[{}]")
    found = load_cells(f"{TINY}:{corpus}", str(tmp_path / "cells.json"), bracket=3)
    sweep = manifest_of(entries(found, price.price_all(found, price.accelerator(None, share_of_peak=1, dollars=None))))
    manifest.write(tmp_path, sweep)
    for entry, loss in zip(sweep.cells, losses, strict=True):
        if loss is not None:
            lines(tmp_path / entry.workdir / "summary.json", {"step": entry.steps, "val_full/a/loss": loss})
    notes = list(status.bracket_notes(sweep, status.rows(tmp_path)))
    assert [note] == [each.rpartition("; ")[2].removesuffix(" ones") for each in notes] or (note == "" and not notes)
