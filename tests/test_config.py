"""Settings from the command line: what they may be, and that nothing but a message comes of one that may not be."""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmjax.config import Config, _kinds, from_json, load, parse, to_json
from lmjax.data.config import PrepareConfig
from lmjax.errors import ConfigError
from lmjax.models.parameters import parameters
from lmjax.names import names_in
from lmjax.optim.hyperparameters import RULES, Scale

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


# Rules for hyperparameters ----------------------------------------------------------------------------------------

SMALL = ["model.layers=4", "model.embed=256", "model.heads=2", "model.mlp=1024", "model.vocab=4096"]


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A config file that sets nothing that a rule sets."""
    path = tmp_path / "bare.py"
    path.write_text("from lmjax.config import default_config\n\n\ndef get_config():\n    return default_config()\n")
    return str(path)


def test_without_a_rule_nothing_changes(bare: str) -> None:
    assert load(bare) == Config()
    assert load(bare, ["train.tokens=4096000"]) == dataclasses.replace(
        Config(), train=dataclasses.replace(Config().train, tokens=4_096_000)
    )  # 1000 steps of 16 x 256, as they are by default


@pytest.mark.parametrize("name", RULES)
def test_a_rule_sets_what_nobody_set(bare: str, name: str) -> None:
    cfg = load(bare, [*SMALL, f"hyperparameters={name}", "train.tokens=4000000000"])
    scale = Scale(4e9, 256, 4, 256, parameters(cfg.model))
    batch = cfg.train.batch * cfg.data.seq_len
    for key, value in RULES[name].advise(scale, batch).settings().items():
        assert setting(cfg, key) == value, key
    assert cfg.optimizer.name == RULES[name].optimizer and cfg.hyperparameters == name
    assert cfg.train.steps * batch == pytest.approx(4e9, rel=1e-3)
    said = RULES[name].batch
    assert cfg.train.batch == 16 if said is None else 2**-0.5 <= batch / said(scale) <= 2**0.5


def setting(cfg: Config, key: str) -> Any:
    node: Any = cfg
    for name in key.split("."):
        node = getattr(node, name)
    return node


def test_what_is_set_by_hand_stays(bare: str, tmp_path: Path) -> None:
    by_hand = ["optimizer.learning_rate=0.5", "train.batch=48", "optimizer.schedule.warmup=7"]
    cfg = load(bare, [*SMALL, "hyperparameters=marin", "train.tokens=4000000000", *by_hand])
    assert (cfg.optimizer.learning_rate, cfg.train.batch, cfg.optimizer.schedule.warmup) == (0.5, 48, 7)
    assert (cfg.optimizer.b1, cfg.optimizer.schedule.name) == (0.95, "wsd")
    filed = tmp_path / "filed.py"
    filed.write_text(Path(bare).read_text().replace("    return default_config()", """\
    config = default_config()
    config.optimizer.learning_rate = 0.25
    config.train.batch = 32
    config.train.steps = 3000
    return config"""))  # fmt: skip
    cfg = load(str(filed), [*SMALL, "hyperparameters=porian"])
    assert (cfg.optimizer.learning_rate, cfg.train.batch, cfg.train.steps) == (0.25, 32, 3000)
    assert cfg.optimizer.schedule.name == "constant"
    # Tokens on the command line replace the file's steps.
    cfg = load(str(filed), [*SMALL, "train.tokens=100000000"])
    assert (cfg.train.batch, cfg.train.steps) == (32, 12207)


def test_a_default_on_the_command_line_is_set_by_hand(bare: str) -> None:
    cfg = load(bare, [*SMALL, "hyperparameters=step_law", "optimizer.learning_rate=1e-3", "train.steps=5000"])
    assert cfg.optimizer.learning_rate == Config().optimizer.learning_rate
    assert cfg.optimizer.schedule.warmup == 2000


LEARNED = """
from lmjax.config import as_config_dict, default_config
from lmjax.data.config import PrepareConfig, SourceConfig

def get_config():
    config = default_config()
    recipe = PrepareConfig(inputs=("stdlib:",))
    config.data.sources = {"stdlib": as_config_dict(SourceConfig(path="data/stdlib", prepare=recipe))}
    return config
"""


def test_the_head_counts_with_the_vocabulary_that_a_recipe_learns(bare: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(LEARNED)
    learned, porian = str(tmp_path / "recipe.py"), "hyperparameters=porian"
    source = "data.sources.stdlib.prepare.tokenizer"
    rates = []
    for vocab in (2048, 4096):
        said = load(learned, [porian, f"{source}.vocab={vocab}"]).optimizer
        assert said == load(bare, [porian, f"model.vocab={vocab}"]).optimizer
        rates.append(said.learning_rate)
    assert rates[0] > rates[1]
    with pytest.raises(ConfigError, match=r"set model\.vocab"):
        load(learned, [porian, f"{source}.kind=bytes"])


def test_a_resolved_config_is_not_resolved_again(bare: str, tmp_path: Path) -> None:
    """Not even if the law that it names is gone."""
    law = {"log_coefficient": -5.0, "params_exponent": 0.0, "tokens_exponent": 0.0}
    reach = {"params_range": [1.0, 1e12], "tokens_range": [1.0, 1e12]}
    path = tmp_path / "law.json"
    path.write_text(json.dumps({"format": 1, "params": "total", **reach, "laws": {"learning_rate": law}}))
    for name in (str(path), "step_law"):
        cfg = load(bare, [*SMALL, f"hyperparameters={name}", "train.tokens=4000000000"])
        (tmp_path / "config.json").write_text(to_json(cfg))
        if name == str(path):
            assert cfg.optimizer.learning_rate == pytest.approx(math.exp(-5.0))
            path.unlink()
        assert from_json(tmp_path / "config.json") == cfg


def test_outside_its_range_a_rule_warns(bare: str, caplog: pytest.LogCaptureFixture) -> None:
    load(bare, [*SMALL, "hyperparameters=step_law", "train.tokens=4000000000"])
    assert [record.getMessage() for record in caplog.records] == [
        "hyperparameters=step_law: N (layers) = 3.15e+06 is outside 5.9e+07 to 1.08e+09, where the rule was fitted"
    ]
    caplog.clear()
    experts = ["model.moe.experts=4", "hyperparameters=deepseek", "train.tokens=400000000000"]
    load(bare, [*SMALL, *experts])
    assert [record.getMessage() for record in caplog.records] == [
        "hyperparameters=deepseek: the rule was fitted to dense models; N is what a token passes through"
    ]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["hyperparameters=step_lw"], "config.hyperparameters: there is no rule 'step_lw' (did you mean 'step_law'?)"),
        (["hyperparameters=none.json"], "none.json: cannot be read (No such file or directory)"),
        (["hyperparameters=porian"], "N counted as 'matmul' needs the vocabulary: set model.vocab"),
        (["train.tokens=1000000", "train.steps=5"], "train.tokens and train.steps are both set; leave out the one"),
        (["hyperparameters=nanochat", "optimizer.name=lion"], "hyperparameters=nanochat is a rule for muon, not lion"),
        (
            ["hyperparameters=nanochat", "optimizer.name=adamw"],
            "hyperparameters=nanochat is a rule for muon, not adamw",
        ),
        (
            ["hyperparameters=deepseek"],
            "optimizer.schedule.warmup=2000 is longer than train.steps=1000; lower the one or raise the other (with "
            "what hyperparameters=deepseek sets)",
        ),
        (["train.tokens=1000", "optimizer.schedule.warmup=9"], "is longer than train.steps=1;"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(bare: str, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(bare, overrides)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_rule_with_nothing_to_set_is_refused(bare: str) -> None:
    by_hand = ["optimizer.learning_rate=1e-3", "optimizer.schedule.name=constant", "optimizer.schedule.warmup=1"]
    with pytest.raises(ConfigError, match=r"^hyperparameters=porian has nothing to set: what it says is set by hand"):
        load(bare, [*SMALL, "hyperparameters=porian", "optimizer.name=adamw", *by_hand])
    assert load(bare, [*SMALL, "hyperparameters=porian", "optimizer.name=adamw", *by_hand, "train.tokens=100000000"])


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
    "no such rule": ["train", f"--config={QUICKSTART}", "--workdir=w", "--config.hyperparameters=best"],
    "no such law": ["train", f"--config={QUICKSTART}", "--workdir=w", "--config.hyperparameters=law.json"],
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
        ("lmjax.registry", "TASKS"),
        ("lmjax.finetune.adapters", "ADAPTERS"),
        ("lmjax.finetune.storage", "STORAGES"),
    ],
)
def test_names_in_the_source_are_those_of_the_registry(module: str, registry: str) -> None:
    assert names_in(module, registry) == list(getattr(importlib.import_module(module), registry))


def test_a_saved_config_of_other_settings_is_named(tmp_path: Path) -> None:
    """It may be of another version, and is not what the command line says."""
    (tmp_path / "config.json").write_text('{"train": {"epochs": 3}}')
    with pytest.raises(ConfigError, match=r"config\.json: .*epochs"):
        from_json(tmp_path / "config.json")
