"""What XLA says that the steps of cells need."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch import ahead, price, table
from launch.__main__ import main
from lmjax.cells import load_cells
from lmjax.errors import ConfigError
from lmjax.plan import step, topology
from tests.launch.test_sweep import SHORT, TINY

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX has started in this process, with devices enough."""
    monkeypatch.setattr(topology, "prepare_process", lambda target: None)


CELLS = [{"model.embed": 16}, {"model.embed": 16, "train.seed": 1, "optimizer.learning_rate": 0.01}, {}]


def test_cells_of_one_program_are_compiled_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their memory is more than the state alone, and the table shows it."""
    plans, make_plan = [], step.make_plan

    def counted(*arguments: Any) -> step.Plan:
        plans.append(make_plan(*arguments))
        return plans[-1]

    monkeypatch.setattr(ahead, "make_plan", counted)
    (tmp_path / "cells.json").write_text(json.dumps(CELLS))
    flags = [f"--cells={tmp_path / 'cells.json'}", f"--out={tmp_path / 'sweep'}", "--dry-run", "--compile", *SHORT]
    assert main(["sweep", f"{TINY}:{corpus}", *flags]) == 0
    said = capsys.readouterr().out
    assert len(plans) == 2 and "as XLA compiles it" in said
    found = load_cells(f"{TINY}:{corpus}", str(tmp_path / "cells.json"))
    states = [one.state_bytes for one in price.price_all(found, price.accelerator(None, share_of_peak=1, dollars=None))]
    assert plans[0].needed > states[0] and plans[1].needed > states[2]
    assert said.count(table.size(plans[0].needed)) == 2 and said.count(table.size(plans[1].needed)) == 1


def test_a_cell_that_does_not_fit_is_named(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of them, however many there are."""
    (tmp_path / "cells.json").write_text(json.dumps(CELLS))
    cells = load_cells(
        f"{TINY}:{corpus}", str(tmp_path / "cells.json"), [text.removeprefix("--config.") for text in SHORT]
    )
    small = step.chips.Chip(1e12, hbm=1e4)
    monkeypatch.setattr(step.chips, "chip", lambda kind: small)
    with pytest.raises(ConfigError, match=r"cell 0: does not fit: at least .* too much"):
        ahead.step_bytes(cells, topology.parse("cpu-1"))


@pytest.mark.parametrize(("accelerator", "problem"), [("H100-8", "not for H100-8"), ("v5e-8", "libtpu|pip install")])
def test_what_cannot_be_compiled_for_is_told(
    corpus: Path, tmp_path: Path, accelerator: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_libtpu(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("libtpu is not installed")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", without_libtpu)
    (tmp_path / "cells.json").write_text(json.dumps(CELLS))
    flags = [f"--cells={tmp_path / 'cells.json'}", f"--out={tmp_path / 'sweep'}", f"--accelerator={accelerator}"]
    with pytest.raises(ConfigError, match=problem):
        main(["sweep", f"{TINY}:{corpus}", *flags, "--dry-run", "--compile", "--config.train.batch=16", *SHORT])
