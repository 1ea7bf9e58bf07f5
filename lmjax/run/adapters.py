"""Several runs that stand on the same frozen weights, as adapters do, with these read once."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from lmjax import config as configs
from lmjax.data.tokenizers.load import load_tokenizer
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import ConfigError
from lmjax.finetune.peft.format import CONFIG
from lmjax.finetune.select import matching
from lmjax.finetune.tune import BASE, OWN
from lmjax.hf.config_json import differences
from lmjax.models import architectures
from lmjax.models.config import ModelConfig
from lmjax.registry import without_data
from lmjax.run.assemble import spec_shardings
from lmjax.run.peft import standing_on
from lmjax.run.trained import Trained, restore
from lmjax.tasks.start import directory_of, model_of, pinned, read_from, tokenizer_of
from lmjax.tasks.task import Task
from lmjax.weights import Params, by_path, part


class Adapter(NamedTuple):
    """A model that answers as one adapter makes it."""

    name: str
    """As it was given."""
    trained: Trained
    templates: epath.Path
    """Where its chat template is."""


class _Found(NamedTuple):
    name: str
    task: Task
    params: Params
    step: int
    tokenizer: Tokenizer
    templates: epath.Path


def load_adapters(base: str, names: Sequence[str]) -> Iterator[Adapter]:
    """One model after another, each the weights of `base` (as `train.init_from` names them) with the adapter of a work
    directory, or of PEFT's, beside them.

    All are looked at before the base is read. Raises ConfigError for what is no adapter, or is for another model, and
    CheckpointError for one that was trained on other weights.
    """
    model, origin = model_of(base), pinned(base)
    found = [_of_peft(name, origin, model) if _is_peft(name) else _of_run(name, origin, model) for name in names]
    spec = architectures.build(model).spec
    weights = read_from(origin, model, spec)(jax.random.key(0), {}, spec_shardings(spec, None))
    for one in found:
        task = one.task
        assert task.language is not None and task.language.frozen is not None
        stands_on = task.language.frozen
        frozen = stands_on.hold({BASE: part(weights, stands_on.spec[BASE]), OWN: {}})
        whole = task.language.weights(frozen, one.params)
        trained = Trained(task.cfg, task.language.model, task.language.scorer, whole, one.tokenizer, one.step)
        yield Adapter(one.name, trained, one.templates)


def _is_peft(name: str) -> bool:
    return (epath.Path(name) / CONFIG).exists()


def _of_run(name: str, origin: str, model: ModelConfig) -> _Found:
    workdir = epath.Path(name)
    cfg = configs.from_json(workdir / "config.json")
    for setting, (theirs, ours) in differences(cfg.model, model).items():
        raise ConfigError(f"--adapter={name} is for another model: model.{setting} is {theirs!r} there, {ours!r} here")
    task = without_data(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, init_from=origin)))
    if task.language is None or cfg.tune.adapter is None or cfg.tune.last_layers is not None:
        raise ConfigError(f"--adapter={name} is a model of its own, not one beside another; give it as --workdir")
    assert task.frozen is not None
    drawn = matching(architectures.build(model).spec, cfg.tune.fresh, "tune.fresh")
    if own := [path for path in drawn if path in by_path(task.frozen.spec[BASE])]:
        raise ConfigError(
            f"--adapter={name} has {own[0]} drawn anew (tune.fresh), not of the base; give it as --workdir"
        )
    params, step = restore(workdir, task, None)
    templates = workdir / "tokenizer"
    return _Found(name, task, params, step, load_tokenizer(templates), templates)


def _of_peft(name: str, origin: str, model: ModelConfig) -> _Found:
    """Of which nothing says what weights it was trained on."""
    cfg, params = standing_on(Path(name), origin, model)
    tokenizer, _ = tokenizer_of(origin, model)
    if tokenizer is None:
        raise ConfigError(f"{directory_of(origin)} has no tokenizer, with which --adapter={name} would read the prompt")
    home = directory_of(origin)
    templates = home / "tokenizer" if (home / "tokenizer").exists() else home
    return _Found(name, without_data(cfg), jax.tree.map(jnp.asarray, params), 0, tokenizer, templates)
