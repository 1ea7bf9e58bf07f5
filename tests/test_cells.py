"""Cells of a sweep: how they are made, and that all of them are checked before any counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmjax.cells import chain, each, load_cells, product, seeds, short_names, shown, zipped
from lmjax.errors import LmjaxError

FILE = """
from lmjax.cells import each, product, seeds
from lmjax.config import default_config

def get_config(width="64"):
    config = default_config()
    config.model.embed = int(width)
    return config

def sweep(width="64"):
    return product(each("optimizer.learning_rate", [1e-3, 2e-3]), seeds(2))
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "sweep.py"
    path.write_text(FILE)
    return str(path)


def listed(tmp_path: Path, cells: Any) -> str:
    path = tmp_path / "cells.json"
    path.write_text(json.dumps(cells))
    return str(path)


def test_factors_columns_and_parts() -> None:
    rates, widths = each("lr", [1, 2]), each("embed", [8, 16])
    assert product(widths, rates) == [{"embed": w, "lr": r} for w in (8, 16) for r in (1, 2)]
    assert zipped(widths, rates) == [{"embed": 8, "lr": 1}, {"embed": 16, "lr": 2}]
    assert chain(rates, seeds(1)) == [{"lr": 1}, {"lr": 2}, {"train.seed": 0}]
    assert product() == [{}]
    with pytest.raises(LmjaxError, match="1, 2 cells"):
        zipped(seeds(1), rates)
    with pytest.raises(LmjaxError, match="two factors of a sweep set lr"):
        product(rates, rates)


def test_cells_are_configs_with_their_overrides(file: str) -> None:
    cells = load_cells(f"{file}:128", common=["train.steps=7", "optimizer.schedule.warmup=2"])
    assert [(cell.cfg.optimizer.learning_rate, cell.cfg.train.seed) for cell in cells] == [
        (1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1),
    ]  # fmt: skip
    assert {(cell.cfg.model.embed, cell.cfg.train.steps) for cell in cells} == {(128, 7)}
    assert cells[2].arguments == ["--config.optimizer.learning_rate=0.002", "--config.train.seed=0"]
    assert len({cell.digest for cell in cells}) == 4


def test_a_cell_goes_before_what_is_common(file: str, tmp_path: Path) -> None:
    (cell,) = load_cells(file, listed(tmp_path, [{"train.batch": 4}]), common=["train.batch=8"])
    assert cell.cfg.train.batch == 4


def test_where_numbers_are_shown_makes_no_other_run(file: str, tmp_path: Path) -> None:
    (one,) = load_cells(file, listed(tmp_path, [{"tracking.name": "one"}]))
    (other,) = load_cells(file, listed(tmp_path, [{"tracking.wandb": "offline"}]))
    assert one.digest == other.digest


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ([{}, {"model.embd": 8}], "cell 1: .*model.embd: unknown key.*did you mean 'embed'"),
        ([{}, {}], "cells 0 and 1 are the same run"),
        ([{"train.steps": 1000}, {}], "cells 0 and 1 are the same run"),  # it is the default
        ([{}, {"train.steps": -1}], "cell 1: .*train.steps=-1"),
        ([3], "cell 0 is 3; write an object"),
        ([], "has no cells"),
        ({}, "no JSON list"),
    ],
)
def test_one_bad_cell_is_named(file: str, tmp_path: Path, cells: Any, problem: str) -> None:
    with pytest.raises(LmjaxError, match=problem):
        load_cells(file, listed(tmp_path, cells))


def test_a_file_without_a_sweep_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(FILE.partition("def sweep")[0])
    with pytest.raises(LmjaxError, match="has no function sweep"):
        load_cells(str(tmp_path / "plain.py"))
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(LmjaxError, match=r"--cells=.*broken\.json"):
        load_cells(str(tmp_path / "plain.py"), str(tmp_path / "broken.json"))


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["model.embed", "train.seed"]) == ["embed", "seed"]
    assert short_names(["optimizer.name", "tracking.name", "x"]) == ["optimizer.name", "tracking.name", "x"]
    assert shown({"model.embed": 8, "train.seed": 0}) == "embed=8 seed=0"


def test_a_bracket_is_around_the_rate_that_a_cell_has_come_to(file: str, tmp_path: Path) -> None:
    named = listed(
        tmp_path, [{"tracking.name": "one"}, {"hyperparameters": "deepseek", "model.vocab": 100, "train.steps": 5000}]
    )
    middles = load_cells(file, named)
    cells = load_cells(file, named, bracket=3)
    for place, middle in enumerate(middles):
        three = cells[3 * place : 3 * place + 3]
        rate = middle.cfg.optimizer.learning_rate
        assert [cell.cfg.optimizer.learning_rate for cell in three] == [rate / 2, rate, 2 * rate]
        assert {cell.bracket for cell in three} == {middle.digest}
        assert [cell.factor for cell in three] == [0.5, 1.0, 2.0]
        assert {cell.cfg.optimizer.schedule for cell in three} == {middle.cfg.optimizer.schedule}
    assert cells[0].cfg.tracking.name == "one-lr0.5x"
    for count in (1, 2, 4):
        with pytest.raises(LmjaxError, match=f"--bracket={count} must be odd"):
            load_cells(file, named, bracket=count)
