"""Cells that branch from others of their sweep: which may, when they start, and what becomes of them."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from launch import cell, manifest, price, status, table, trunks
from launch.__main__ import main
from launch.engines import local
from launch.job import Hardware, Job
from launch.manifest import Entry
from launch.sweep import entries, jobs_of, joined
from lmjax.cells import load_cells
from lmjax.errors import ConfigError
from tests.launch.test_sweep import SHORT, TINY, manifest_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEPT = [
    "--config.checkpoint.every=4",
    "--config.checkpoint.keep_every=4",
    "--config.model.layers=1",
    "--config.optimizer.schedule.warmup=2",
]
TRUNK = {"tracking.name": "trunk", "optimizer.schedule.name": "constant", "train.steps": 12}
DECAYED = {"optimizer.schedule.name": "wsd", "optimizer.schedule.decay_fraction": 0.25}
BRANCHES = [
    {"tracking.name": "short", **DECAYED, "train.steps": 6, "train.branch_from": "trunk@4"},
    {"tracking.name": "long", **DECAYED, "train.steps": 14, "train.branch_from": "trunk@8"},
]


def written(tmp_path: Path, cells: list[dict[str, Any]]) -> str:
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    return str(tmp_path / "cells.json")


def planned(corpus: Path, tmp_path: Path, cells: list[dict[str, Any]], accelerator: str | None = None) -> list[Entry]:
    common = [flag.removeprefix("--config.") for flag in [*SHORT, *KEPT]]
    found = load_cells(f"{TINY}:{corpus}", written(tmp_path, cells), common)
    on = price.accelerator(accelerator, share_of_peak=0.5, dollars=None)
    return trunks.resolved(entries(found, price.price_all(found, on)), found)


@pytest.mark.slow
def test_branches_are_the_runs_that_their_configs_say(corpus: Path, tmp_path: Path) -> None:
    """Started before their trunk stands in the list, and resumed in the middle of it all by the same command."""
    apart = [{key: value for key, value in cell.items() if key != "train.branch_from"} for cell in BRANCHES]
    for name, cells in {"apart": apart, "together": [*BRANCHES, TRUNK]}.items():
        listed = f"--cells={written(tmp_path, cells)}"
        assert main(["sweep", f"{TINY}:{corpus}", listed, f"--out={tmp_path / name}", *SHORT, *KEPT]) == 0
    for index in range(len(BRANCHES)):
        summaries = [
            json.loads((tmp_path / name / "cells" / f"{index:04d}" / "summary.json").read_text())
            for name in ("apart", "together")
        ]
        assert summaries[0] == summaries[1]
    rows = status.rows(tmp_path / "together")
    assert status.headline(rows).startswith("3 of 3 done; 100% of the FLOPs")


def test_their_own_steps_are_priced(corpus: Path, tmp_path: Path) -> None:
    short, long, trunk = planned(corpus, tmp_path, [*BRANCHES, TRUNK], "v5e-4")
    assert (short.trunk, long.trunk, trunk.trunk) == (2, 2, None) and (short.first_step, long.first_step) == (4, 8)
    assert (short.share, long.share, trunk.share) == pytest.approx((2 / 6, 6 / 14, 1))
    assert trunk.hours and short.hours and short.hours / trunk.hours == pytest.approx(2 / 12)
    assert "2 cells branch from 1" in table.saved([short, long, trunk]) and "0% saved" in table.saved(
        [short, long, trunk]
    )
    assert table.saved([trunk]) == ""


def test_they_start_from_the_directory_of_their_trunk(corpus: Path, tmp_path: Path) -> None:
    sweep = manifest_of(planned(corpus, tmp_path, [*BRANCHES, TRUNK]))
    given = [cell.arguments(sweep, [entry], "/sweeps/first/") for entry in sweep.cells]
    assert "--config.train.branch_from=/sweeps/first/cells/0002@8" in given[1]
    assert not any("branch_from" in argument for argument in given[2])


def test_added_branches_find_their_trunk(corpus: Path, tmp_path: Path) -> None:
    old = manifest_of(planned(corpus, tmp_path, [{"train.seed": 7}, TRUNK]))
    extended = joined(old, planned(corpus, tmp_path, [TRUNK, *BRANCHES]), tmp_path, extend=True)
    assert [(entry.index, entry.trunk) for entry in extended] == [(0, None), (1, None), (2, 1), (3, 1)]


def test_a_branch_waits_for_its_trunk(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = planned(corpus, tmp_path, [*BRANCHES, TRUNK])
    manifest.write(tmp_path, manifest_of(cells))
    here, elsewhere = Namespace(engine="local", jobs=1, stack=1), Namespace(engine="slurm", stack=1)
    assert [one.after for one in jobs_of("s", tmp_path, cells, cells, here)] == [2, 2, None]
    assert [one.index for one in jobs_of("s", tmp_path, cells, cells, elsewhere)] == [2]
    assert "2 cells branch from others" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="cell 0 branches from cell 2, which is not done; start that, too"):
        jobs_of("s", tmp_path, cells[:1], cells, here)
    assert [row.why for row in status.rows(tmp_path)] == ["comes after cell 2", "comes after cell 2", ""]


@pytest.mark.parametrize(("code", "order"), [(0, "201"), (5, "2")])
def test_nothing_starts_before_what_it_comes_after(corpus: Path, tmp_path: Path, code: int, order: str) -> None:
    """And not at all when that fails."""
    manifest.write(tmp_path, manifest_of(planned(corpus, tmp_path, [*BRANCHES, TRUNK])))
    (tmp_path / "cells").mkdir()
    tell = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
    jobs = [
        Job(
            index,
            f"j{index}",
            (sys.executable, "-c", tell, str(tmp_path / "order"), str(index), str(code)),
            {},
            flops,
            after,
        )
        for index, flops, after in ((0, 9.0, 2), (1, 8.0, 2), (2, 1.0, None))
    ]
    ended = local.submit("s", str(tmp_path), jobs, Hardware(), Namespace(jobs=1, retries=0))
    assert (ended, (tmp_path / "order").read_text()) == (1 if code else 0, order)


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        (
            [{**BRANCHES[0], "train.branch_from": "trunk@5"}, TRUNK],
            "keeps no checkpoint of step 5; it trains 12 steps",
        ),
        (
            [{**BRANCHES[0], "train.branch_from": "trunk@16", "train.steps": 40}, TRUNK],
            "keeps no checkpoint of step 16",
        ),
        ([{**BRANCHES[0], "train.branch_from": "trunk"}, TRUNK], "say at which step, trunk@STEP"),
        ([{**BRANCHES[0], "train.branch_from": "trunk@x"}, TRUNK], "say at which step, trunk@STEP"),
        ([{**BRANCHES[0], "model.embed": 16}, TRUNK], "model.embed is 32 there and 16 here"),
        ([{**BRANCHES[0], "optimizer.schedule.decay_fraction": 0.6}, TRUNK], "update 3 has the learning rate"),
        ([BRANCHES[0], TRUNK, {**TRUNK, "train.seed": 1}], "2 cells have that name"),
        ([BRANCHES[0]], "trunk is not the work directory of a run"),
    ],
)
def test_what_is_no_branch_is_named(corpus: Path, tmp_path: Path, cells: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"cell 0: train\.branch_from=.*{problem}"):
        planned(corpus, tmp_path, cells)
