"""Settings from the command line: what they may be, and that nothing but a message comes of one that may not be."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmjax.config import _kinds, from_json, load, parse, to_json
from lmjax.data.config import PrepareConfig
from lmjax.errors import ConfigError
from lmjax.schema import names_in

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
RECIPE = "data.sources.stdlib.prepare"


def test_a_group_that_may_be_off_is_switched_off_and_on() -> None:
    assert load(QUICKSTART, [f"{RECIPE}=None"]).data.sources["stdlib"].prepare is None
    again = load(QUICKSTART, [f"{RECIPE}=None", f"{RECIPE}.tokenizer.kind=bytes"]).data.sources["stdlib"].prepare
    assert again == dataclasses.replace(PrepareConfig(), tokenizer=dataclasses.replace(again.tokenizer, kind="bytes"))


@pytest.mark.parametrize(
    "group", ["model", "train.sample", "data.sources", "data.sources.stdlib", f"{RECIPE}.tokenizer"]
)
def test_other_groups_are_set_one_by_one(group: str) -> None:
    for value in ("None", "{}", "1"):
        with pytest.raises(ConfigError, match=rf"^--config\.{group} is a group of settings; set one of "):
            load(QUICKSTART, [f"{group}={value}"])


def test_text_is_taken_as_it_is_and_none_is_none() -> None:
    cfg = load(QUICKSTART, ["tracking.name=123", "tracking.group=[x]", "tracking.entity=e", "tracking.entity=None"])
    assert (cfg.tracking.name, cfg.tracking.group, cfg.tracking.entity) == ("123", "[x]", None)
    assert load(QUICKSTART, ["tracking.project=None"]).tracking.project == "None"  # which may not be off


def paths(value: Any, path: str = "") -> Iterator[str]:
    """Every setting of a config, those of its sources and their recipes among them."""
    if not dataclasses.is_dataclass(value) and not isinstance(value, dict):
        yield path
        return
    children = value if isinstance(value, dict) else {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    for name, child in children.items():
        yield from paths(child, f"{path}.{name}" if path else name)


HOSTILE = (
    *("-1", "0", "1", "0.5", "-0.5", "1e400", "-1e400", "nan", "inf", "9" * 30, "9" * 5000, "None", "True", "text", ""),
    *("[]", "{}", "()", "[[1]]", "{'a': 1}", "{[]: 1}", "'", "(1,", "(" * 5000, "b'x'", "1j", "...", "x" * 100_000),
)


@pytest.mark.parametrize("path", paths(load(QUICKSTART)))
def test_a_hostile_value_is_a_setting_or_a_mistake_of_the_user(path: str) -> None:
    refused = 0
    for value in HOSTILE:
        try:
            cfg = load(QUICKSTART, [f"{path}={value}"])
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error) and path.partition(".")[0] in str(error) and len(str(error)) < 600
        else:
            assert parse(json.loads(to_json(cfg))) == cfg
    assert refused or str in _kinds(path.split("."))  # any text is a text


# What is wrong is said before JAX is there ------------------------------------------------------------------------

MISTAKES = {
    "help": ["--help"],
    "help of a command": ["train", "--help"],
    "no such command": ["trian"],
    "no such argument": ["train", f"--config={QUICKSTART}", "--workdir=w", "--wrong"],
    "no such file": ["train", "--config=none.py", "--workdir=w"],
    "no such file to plan": ["plan", "--config=none.py", "--topology=v5e-8"],
    "no such key": ["train", f"--config={QUICKSTART}", "--workdir=w", "--config.model.layer=2"],
    "no such value": ["train", f"--config={QUICKSTART}", "--workdir=w", "--config.model.activation=gelo"],
    "settings that contradict": ["train", f"--config={QUICKSTART}", "--workdir=w", "--config.model.heads=3"],
    "too many layers": ["train", f"--config={QUICKSTART}", "--workdir=w", "--config.model.layers=1000000000000"],
    "too large a batch": ["train", f"--config={QUICKSTART}", "--workdir=w", "--config.train.batch=1099511627776"],
    "no such arm": ["train", f"--config={ROOT / 'configs' / 'gpt2.py'}:1b", "--workdir=w"],
}

# Runs a command and, at its very end, tells what it has imported.
WITNESS = """
import os, sys
from lmjax.__main__ import main
leave = os._exit
def told(code):
    print("jax" in sys.modules, file=sys.stderr)
    sys.stderr.flush()
    leave(code)
os._exit = told
sys.argv[0] = "lmjax"
try:
    main()
except SystemExit as end:
    told(end.code)
"""


@pytest.mark.parametrize("arguments", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_a_config_are_found_without_jax(arguments: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"GLIBC_TUNABLES": "", "PYTHONPATH": str(ROOT)}  # tunables: the process stays itself
    done = subprocess.run(
        [sys.executable, "-c", WITNESS, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
    *said, imported = done.stderr.splitlines()
    assert imported == "False"
    assert not said or said[-1].startswith("lmjax: error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "registry"),
    [
        ("lmjax.models.activations", "ACTIVATIONS"),
        ("lmjax.models.attention.attention", "BACKENDS"),
        ("lmjax.models.moe.moe", "DISPATCHES"),
        ("lmjax.models.remat", "REMAT"),
        ("lmjax.optim.rules", "OPTIMIZERS"),
        ("lmjax.optim.schedules", "SCHEDULES"),
        ("lmjax.losses", "TOKEN_LOSSES"),
        ("lmjax.devices.mesh", "LAYOUTS"),
        ("lmjax.models.architectures", "ARCHITECTURES"),
        ("lmjax.models.mixers", "MIXERS"),
        ("lmjax.data.mixture", "MIXTURES"),
        ("lmjax.tasks.registry", "TASKS"),
    ],
)
def test_names_in_the_source_are_those_of_the_registry(module: str, registry: str) -> None:
    assert names_in(module, registry) == list(getattr(importlib.import_module(module), registry))


def test_a_saved_config_of_other_settings_is_named(tmp_path: Path) -> None:
    """It may be of another version, and is not what the command line says."""
    (tmp_path / "config.json").write_text('{"train": {"epochs": 3}}')
    with pytest.raises(ConfigError, match=r"config\.json: .*epochs"):
        from_json(tmp_path / "config.json")
