"""The schema of an experiment, composed of its parts' configs, and its surface: a locked ConfigDict.

    config file (Python: it is code, run it only if you trust it) -> ConfigDict -> overrides -> rule -> Config

A config file starts from `default_config()`, where a misspelt key is an error at once, and changes what it needs. The
typed `Config` checks types, ranges, choices and what fields demand of each other, once, before a device is touched, and
before JAX is imported, which takes a second: the schema reads the names that it chooses from in the source.
"""

import ast
import copy
import dataclasses
import difflib
import functools
import importlib.util
import json
import logging
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from etils import epath
from ml_collections import ConfigDict
from pydantic import AfterValidator

from lmjax.data.config import DataConfig
from lmjax.devices.config import MeshConfig
from lmjax.errors import ConfigError, one_line
from lmjax.models.config import ModelConfig, require_learning
from lmjax.models.parameters import parameters
from lmjax.names import names_in
from lmjax.optim.config import OptimizerConfig
from lmjax.optim.hyperparameters import RULES, Rule, Scale, find_rule, is_law, rows, updates
from lmjax.process.redact import hide
from lmjax.record import formats
from lmjax.record.config import CheckpointConfig, TrackingConfig
from lmjax.record.files import hash_bytes, write_atomically
from lmjax.schema import config_class, one_of, validated
from lmjax.train.config import TrainConfig, TuneConfig

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of config.json."""


def _rule_or_law(name: str | None) -> str | None:
    """Only `load` reads a law: a resolved config holds what it said."""
    if name is not None and not is_law(name):
        find_rule(name)
    return name


_rule_or_law.choices = list(RULES)  # type: ignore[attr-defined]  # for docs/config_page.py


@config_class
class Config:
    """One training run."""

    hyperparameters: Annotated[str | None, AfterValidator(_rule_or_law)] = None
    """The rule, or the file `*.json` of laws fitted to one's own sweep, that sets what neither the config file nor the
    command line sets: learning rate, schedule, decay, and with train.tokens the batch (docs/hyperparameters.md)."""
    task: Annotated[str, one_of(names_in("lmjax.registry", "TASKS"))] = "pretrain"
    """What is trained."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    tune: TuneConfig = TuneConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        if self.model.position == "learned" and self.data.seq_len > self.model.context:
            raise ConfigError(
                f"data.seq_len={self.data.seq_len} is longer than the position table model.context={self.model.context}"
            )
        for name, source in self.data.sources.items():
            learned = source.learning.tokenizer.vocab if source.learning else 0
            if self.model.vocab is not None and self.model.vocab < learned:
                raise ConfigError(
                    f"model.vocab={self.model.vocab} is smaller than the {learned} tokens that the recipe of "
                    f"data.sources.{name} learns; leave it unset"
                )
        if self.train.batch % self.train.microbatches:
            raise ConfigError(
                f"train.batch={self.train.batch} is not divisible by train.microbatches={self.train.microbatches}"
            )
        if self.train.noise_scale and self.train.microbatches == 1:
            raise ConfigError("train.noise_scale compares microbatches with the whole batch; set train.microbatches")
        if self.optimizer.schedule.warmup > self.train.steps:
            raise ConfigError(
                f"optimizer.schedule.warmup={self.optimizer.schedule.warmup} is longer than train.steps="
                f"{self.train.steps}; lower the one or raise the other"
            )


# The surface ------------------------------------------------------------------------------------------------------


def default_config() -> ConfigDict:
    """The defaults of `Config`, locked: setting a key that does not exist raises and suggests the nearest."""
    return as_config_dict(Config())


def as_config_dict(value: Any) -> Any:
    """A config object as nested locked ConfigDicts, for config files to change."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: as_config_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return ConfigDict(fields).lock()
    if isinstance(value, Mapping):  # free keys, such as the names of data sources
        return ConfigDict({name: as_config_dict(child) for name, child in value.items()})
    return value


def parse(tree: Mapping[str, Any]) -> Config:
    """The typed, checked config of a nested dict. Raises ConfigError naming the first key that does not fit."""
    return validated(Config, tree, "config.")


# Files and overrides ----------------------------------------------------------------------------------------------


def load(location: str, overrides: Iterable[str] = ()) -> Config:
    """The config to train, of `path.py[:argument]` with overrides `a.b=value` applied and everything checked."""
    return ConfigFile(location).config(overrides)


class ConfigFile:
    """A config file that was run once, for as many configs as its overrides make of it."""

    def __init__(self, location: str) -> None:
        """`path.py[:argument]`. Raises ConfigError for a file that is not there or does not give a config."""
        self.location = location
        path, _, self._argument = location.partition(":")
        try:
            self.module = _import_file(path)
        except (ConfigError, KeyboardInterrupt):
            raise
        except BaseException as error:  # exit(0), too, must not end in success
            if isinstance(error, FileNotFoundError) and error.filename == path:
                raise ConfigError(f"--config={location}: no such file '{path}'") from None
            raise self._failure(error) from error
        self._tree = self.call("get_config")
        if not isinstance(self._tree, ConfigDict):
            raise ConfigError(f"--config={location}: get_config() must return default_config() with changes")

    def call(self, name: str) -> Any:
        """What a function of the file returns, given the argument of the location where there is one."""
        try:
            function = getattr(self.module, name)
            return function(self._argument) if self._argument else function()
        except (ConfigError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise self._failure(error) from error

    def tree(self, overrides: Iterable[str] = ()) -> ConfigDict:
        """What get_config() returns, with `a.b=value` applied: for other config files to change."""
        tree = copy.deepcopy(self._tree)
        with tree.ignore_type():  # the schema knows types better: a setting may go from None to a number
            for override in overrides:
                _apply_override(tree, override)
        return tree

    def config(self, overrides: Iterable[str] = ()) -> Config:
        """The config with `a.b=value` applied, and everything checked."""
        overrides = list(overrides)
        cfg = _resolved(self.tree(overrides).to_dict(), [override.partition("=")[0] for override in overrides])
        require_learning(cfg.model)
        return cfg

    def _failure(self, error: BaseException) -> ConfigError:
        what = "it ends the process, exit" if isinstance(error, SystemExit) else type(error).__name__
        return ConfigError(f"--config={self.location}: {what}: {one_line(error)}")


def _import_file(path: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path}: a config is a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _apply_override(tree: ConfigDict, override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--config.{override}: give a value, --config.{override}=VALUE")
    *parents, name = path.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        above, here = parents[:depth], parents[: depth + 1]
        if _child(node, parent, path, ".".join(above)) is None and (group := _group(here)):
            node[parent] = dataclasses.asdict(group())  # its first setting switches a group on
        node = node[parent]
        if not isinstance(node, ConfigDict):
            raise ConfigError(f"--config.{path}: '{'.'.join(here)}' has no keys below it")
    old, kinds = _child(node, name, path, ".".join(parents)), _kinds([*parents, name])
    off = text == "None" and types.NoneType in kinds
    if isinstance(old, ConfigDict) and not off:
        raise ConfigError(f"--config.{path} is a group of settings; set one of {', '.join(sorted(old))}")
    try:
        node[name] = None if off else text if str in kinds or isinstance(old, str) else _literal(text)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"--config.{path}={text}: {one_line(error, 200)}") from None


def _kinds(path: Sequence[str]) -> tuple[Any, ...]:
    """What the schema lets a setting or group be: `(X, NoneType)` for an `X | None`, nothing for an unknown key."""
    hint: Any = Config
    for depth, name in enumerate(path):
        if get_origin(hint) is dict:
            hint = get_args(hint)[1]
        else:
            group = _group(path[:depth])
            hint = None if group is None else _type_hints(group).get(name)
    return get_args(hint) if get_origin(hint) in (types.UnionType, Union) else () if hint is None else (hint,)


_type_hints = functools.cache(get_type_hints)


def _group(path: Sequence[str]) -> Any:
    """The class of the group of settings at `path`; None for a single setting."""
    return next((kind for kind in _kinds(path) if dataclasses.is_dataclass(kind)), None)


def _child(node: ConfigDict, name: str, path: str, parent: str) -> Any:
    if name in node:
        return node[name]
    close = difflib.get_close_matches(name, list(node), n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"there is {', '.join(sorted(node)) or 'nothing'}"
    where = f" in '{parent}'" if parent else ""
    raise ConfigError(f"--config.{path}: unknown key '{name}'{where} ({hint})")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last ones of what nests too deep
        return text


# Rules for hyperparameters ----------------------------------------------------------------------------------------


def _resolved(tree: dict[str, Any], given: Sequence[str]) -> Config:
    """The config of a tree, with what train.tokens and hyperparameters say about keys that nobody set.

    A key is set where it is `given` on the command line or differs from its default.
    """
    if tree.get("hyperparameters") is None and tree.get("train", {}).get("tokens") is None:
        return parse(tree)
    # Whether warmup and microbatches fit is known when the steps and the batch are.
    draft = parse(_replaced(tree, {"optimizer.schedule.warmup": 0, "train.microbatches": 1}))
    defaults = settings(Config())
    by_hand = {*given, *(key for key, value in _flat(tree).items() if key in defaults and value != defaults[key])}
    rule = None if draft.hyperparameters is None else find_rule(draft.hyperparameters)
    if "train.tokens" in given and "train.steps" not in given:
        by_hand.discard("train.steps")  # the command line's tokens replace the file's steps
    said = _steps(draft, rule, by_hand)
    if rule is not None:
        said |= _advice(draft, rule, by_hand, said)
    try:
        return parse(_replaced(tree, said))
    except ConfigError as error:
        why = "train.tokens" if rule is None else f"hyperparameters={draft.hyperparameters}"
        raise ConfigError(f"{error} (with what {why} sets)") from None


def _scale(cfg: Config) -> Scale:
    """How large the run is, by the tokens and the vocabulary that the config says."""
    learned = [source.learning.tokenizer.vocab for source in cfg.data.sources.values() if source.learning]
    model = dataclasses.replace(cfg.model, vocab=cfg.model.vocab or next(iter(learned), None))
    tokens = cfg.train.tokens or cfg.train.steps * cfg.train.batch * cfg.data.seq_len
    return Scale(tokens, model.embed, model.layers, cfg.data.seq_len, parameters(model))


def _steps(cfg: Config, rule: Rule | None, by_hand: Collection[str]) -> dict[str, Any]:
    """The batch that a rule chooses for train.tokens, and the steps that they take."""
    if cfg.train.tokens is None:
        return {}
    if "train.steps" in by_hand:
        raise ConfigError("train.tokens and train.steps are both set; leave out the one")
    chosen = {}
    if rule is not None and rule.batch is not None and "train.batch" not in by_hand:
        chosen["train.batch"] = rows(rule.batch(_scale(cfg)), cfg.data.seq_len)
    batch = chosen.get("train.batch") or cfg.train.batch
    return {**chosen, "train.steps": updates(cfg.train.tokens, batch * cfg.data.seq_len)}


def _advice(cfg: Config, rule: Rule, by_hand: Collection[str], said: Mapping[str, Any]) -> dict[str, Any]:
    """What a rule says about the optimizer's settings that nobody set. Logs what lies outside its range."""
    name = cfg.hyperparameters
    if rule.optimizer not in (None, cfg.optimizer.name) and "optimizer.name" in by_hand:
        raise ConfigError(f"hyperparameters={name} is a rule for {rule.optimizer}, not {cfg.optimizer.name}")
    if cfg.model.moe.experts is not None:
        logger.warning(
            "hyperparameters=%s: the rule was fitted to dense models; N is what a token passes through", name
        )
    if cfg.model.parametrization != "standard":
        logger.warning(
            "hyperparameters=%s: the rule follows the model's size, and model.parametrization=%s does so again",
            name,
            cfg.model.parametrization,
        )
    scale, batch = _scale(cfg), (said.get("train.batch") or cfg.train.batch) * cfg.data.seq_len
    for warning in rule.warnings(scale, batch):
        logger.warning("hyperparameters=%s: %s", name, warning)
    advised = rule.advise(scale, batch).settings()
    if rule.optimizer is not None:
        advised["optimizer.name"] = rule.optimizer
    free = {key: value for key, value in advised.items() if key not in by_hand}
    if not free and "train.batch" not in said:
        raise ConfigError(
            f"hyperparameters={name} has nothing to set: what it says is set by hand, and a batch takes train.tokens"
        )
    return free


def _replaced(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict with some of its settings replaced, by keys such as `train.steps`."""
    changed = dict(tree)
    for key, value in values.items():
        first, _, rest = key.partition(".")
        changed[first] = _replaced(changed.get(first, {}), {rest: value}) if rest else value
    return changed


# On disk ----------------------------------------------------------------------------------------------------------


def to_json(cfg: Config) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=1)


def write_json(path: epath.Path, cfg: Config) -> None:
    """The config of a work directory, for `from_json`, without secrets. Raises OSError."""
    write_atomically(path, json.dumps(formats.stamp(FORMAT) | hide(dataclasses.asdict(cfg)), indent=1))


class DamagedConfigError(ConfigError):
    """A file that should hold a config and holds something else."""


def from_json(path: epath.PathLike) -> Config:
    """The resolved config of a work directory: what resuming, evaluating and generating read. Runs no code.

    Raises DamagedConfigError for what is no config at all, ConfigError for one that this version cannot read.
    """
    path = epath.Path(path)
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise DamagedConfigError(f"{path.parent} is no work directory: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedConfigError(f"{path}: no readable config ({one_line(error)}); is it a work directory?") from None
    if not isinstance(tree, dict) or not tree.keys() & {field.name for field in dataclasses.fields(Config)}:
        raise DamagedConfigError(f"{path}: no readable config (it is of something else); is it a work directory?")
    content = formats.unstamped(tree, path, FORMAT, ConfigError)
    try:
        return parse(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; {formats.origin(tree)}") from None


def digest(cfg: Config) -> str:
    """A short hash of the resolved config."""
    return hash_text(to_json(cfg))


def hash_text(*texts: str) -> str:
    """A short hash of texts, as of the config.json of a work directory."""
    return hash_bytes("\n".join(texts).encode(), digest_size=8)


def settings(cfg: Config) -> dict[str, Any]:
    """All settings by their dotted keys."""
    return _flat(dataclasses.asdict(cfg))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train.steps": 100}` of a nested dict."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        key: value
        for name, child in tree.items()
        for key, value in _flat(child, f"{prefix}.{name}" if prefix else name).items()
    }


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, `{"train.steps": (100, 200)}`. What is hidden in a saved config is in both."""
    before, after = hide(settings(old)), hide(settings(new))
    return {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}
