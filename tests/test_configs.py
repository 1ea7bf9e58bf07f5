"""Every config file loads, is what its schema allows, and says what it is for."""

import ast
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from lmjax.cells import load_cells
from lmjax.config import load
from lmjax.errors import DONE, ConfigError, visible
from lmjax.models import decoder
from lmjax.models.flops import sequence_flops
from lmjax.process import start_up
from lmjax.record.tracking import read_events
from lmjax.run.dry_run import with_known_vocab
from lmjax.run.run import Options, run
from lmjax.weights import count

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.py"))
TUNE = sorted((CONFIGS / "tune").glob("*.py"))


@pytest.mark.parametrize("path", [*FILES, *TUNE], ids=lambda path: path.stem)
def test_configs_load_and_open_with_what_they_reproduce(path: Path) -> None:
    load(str(path))
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    positions = [text.find(f"\n{heading}") for heading in ("Reproduces", "Costs", "Command")]
    assert -1 not in positions and positions == sorted(positions)
    assert f"--config=configs/{path.relative_to(CONFIGS)}" in text


def arms(path: Path) -> list[str]:
    """The arguments that a config file takes, as it tells who gives a wrong one; TEXT is some text of one's own."""
    if "get_config()" in path.read_text():
        return [""]
    with contextlib.suppress(ConfigError):
        load(f"{path}:?")
        return [":TEXT"]
    with pytest.raises(ConfigError) as refused:
        load(f"{path}:?")
    _, are, names = str(refused.value).rpartition(" are ")
    return [f":{arm}" for arm in names.split(", ")] if are else [":TEXT"]


# The first arm of a file stands for the others; all of them run under the slow mark.
ARMS = [
    pytest.param(f"{path}{arm}", id=f"{path.name}{arm}", marks=[pytest.mark.slow] if place else [])
    for path in FILES
    for place, arm in enumerate(arms(path))
]

# What is left of a model: its kinds of layers. What is left as shipped: data, optimizer, evaluation, samples.
TINY = [
    "data.seq_len=16",
    "model.context=16",
    "model.layers=2",
    "model.embed=16",
    "model.heads=2",
    "model.head_dim=8",
    "model.mlp=24",
    "model.vocab=None",
    "optimizer.schedule.warmup=1",
    "train.steps=1",
    "train.batch=2",
    "train.evaluate_batch=2",
    "train.evaluate_batches=1",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    for i in range(8):
        (directory / f"{i}.txt").write_text(
            f"All {i} of them speak:\nbefore we proceed any further, hear me speak.\n" * 9
        )
    return directory


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> Iterator[None]:
    """Made tiny, the sizes of a config are one model: its programs are compiled for the first of them."""
    start_up.enable_compile_cache(str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.mark.parametrize("location", ARMS)
def test_every_config_runs_to_its_end(location: str, text: Path, tmp_path: Path, compiled_once: None) -> None:
    location = location.replace(":TEXT", f":{text}")
    shipped = load(location, ["model.vocab=32000"])
    settings = list(TINY)
    if shipped.model.kv_heads is not None:
        settings.append("model.kv_heads=1")
    if shipped.model.moe.experts is not None:
        settings.append("model.moe.mlp=8")
    for name, source in shipped.data.sources.items():
        kind = source.prepare.tokenizer.kind if source.prepare is not None else "bytes"
        recipe = f"data.sources.{name}.prepare"
        settings += [
            f"data.sources.{name}.path={tmp_path / name}",
            f"{recipe}.inputs=('{text}/*.txt',)",
            f"{recipe}.tokenizer.kind={'chars' if kind == 'chars' else 'bytes'}",
            f"{recipe}.valid_fraction=0.2",
            f"{recipe}.split=document",
        ]
    cfg = load(location, settings)
    assert (cfg.train.sample, cfg.train.compression_baseline) == (
        shipped.train.sample,
        shipped.train.compression_baseline,
    )
    workdir = tmp_path / "run"
    assert run(cfg, workdir, Options()) == DONE
    summary = json.loads((workdir / "summary.json").read_text())
    for name in cfg.data.sources:
        assert summary[f"val_full/{name}/loss"] > 0 and summary[f"val/{name}/loss"] > 0
        digest = summary[f"data/{name}/valid_digest"]
        assert len(digest) == 16
        [start] = [event for event in read_events(workdir / "metrics.jsonl") if event["event"] == "start"]
        assert start["validation"][name] == digest and digest in (workdir / "report.md").read_text()
    sample = (workdir / "samples" / "1.txt").read_bytes().decode()  # a carriage return is no newline
    assert sample.startswith(cfg.train.sample.prompts[0])
    assert f"```\n{visible(sample)}" in (workdir / "report.md").read_text()


def test_the_mixture_and_the_dense_model_cost_the_same() -> None:
    """To the FLOP, and in everything that is not the mlp they are one config."""
    mixture, dense = (load(f"{CONFIGS / 'moe.py'}:{arm}", ["model.vocab=257"]) for arm in ("moe", "dense"))
    one, other = (decoder.build(cfg.model) for cfg in (mixture, dense))
    assert sequence_flops(one, 256) == sequence_flops(other, 256)
    assert count(one.spec).active == count(other.spec).active == count(other.spec).total < count(one.spec).total / 2
    assert (mixture.data, mixture.optimizer, mixture.train) == (dense.data, dense.optimizer, dense.train)
    with pytest.raises(ConfigError, match=r"moe\.py:switch: the arms are moe, dense"):
        load(f"{CONFIGS / 'moe.py'}:switch")


# Sweeps ---------------------------------------------------------------------------------------------------------------

SWEEPS = sorted((CONFIGS / "sweeps").glob("*.py"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_open_with_what_they_reproduce_and_their_cells_are_runs(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    positions = [text.find(f"\n{heading}") for heading in ("Reproduces", "Costs", "Command")]
    assert -1 not in positions and positions == sorted(positions)
    assert f"python -m launch sweep configs/sweeps/{path.name}" in text
    for arm in arms(path):
        cells = load_cells(f"{path}{arm}")
        names = [cell.cfg.tracking.name for cell in cells]
        assert len(cells) >= 12 and len({*names}) == len(names) and None not in names


@pytest.mark.parametrize("arm", ["cpu_isoflop.py", "isoflop.py:small", "isoflop.py:hoffmann"])
def test_cells_of_one_budget_cost_the_same(arm: str) -> None:
    """By the declaration, whatever closed form the config file has."""
    costs: dict[str, list[float]] = {}
    for cell in load_cells(str(CONFIGS / "sweeps" / arm)):
        assert cell.cfg.tracking.name is not None
        cfg = with_known_vocab(cell.cfg)
        flops = sequence_flops(decoder.build(cfg.model), cfg.data.seq_len).causal
        costs.setdefault(cell.cfg.tracking.name.partition("-d")[0], []).append(
            flops * cfg.train.steps * cfg.train.batch
        )
    assert len(costs) >= 3
    for budget, flops in costs.items():
        assert len(flops) >= 5 and flops == pytest.approx([float(budget)] * len(flops), rel=0.1), budget
