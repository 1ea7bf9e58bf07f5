"""Distillation: a student learns what its teacher holds probable next, beside the labels or in place of them.

    loss = share T^2 D(p, q) + (1 - share) (-log q(target))

with the teacher's distribution p and the student's q, both at temperature T in D, one of `losses.DIVERGENCES` (Hinton
et al. 2015, arXiv:1503.02531, section 2, where T^2 comes from). Text is read as in pretraining, conversations as in
instruction tuning, of which only what is scored counts. The teacher is frozen, and no part of what is trained; or it is
not there at all, and what it said of the samples is stored (stored.py).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lmjax.config import Config
from lmjax.data.batch import Batch
from lmjax.data.store.manifest import read_manifest
from lmjax.errors import ConfigError
from lmjax.finetune import instruct
from lmjax.finetune.stored import Store, TaughtBatch, TaughtSource
from lmjax.losses import Likeliest, Output, token_divergences
from lmjax.metrics import Metrics
from lmjax.models import architectures
from lmjax.models.flops import sequence_flops
from lmjax.models.model import Model
from lmjax.optim.schedules import Hyper
from lmjax.process import group
from lmjax.record.files import locate
from lmjax.tasks import pretrain
from lmjax.tasks.start import model_of, pinned, read_from
from lmjax.tasks.task import Frozen, Task
from lmjax.train.config import DistillConfig
from lmjax.train.objective import Keys, Objective
from lmjax.weights import Params

_SETTING = "train.distill.teacher"

Said = Callable[[Params, Any], Output | Likeliest]
"""(frozen weights, batch) -> what the teacher says of the batch."""


class Base(NamedTuple):
    """What the student would be trained by without a teacher."""

    task: Callable[[Config], Task]
    without_data: Callable[[Config], Task]


def distill(cfg: Config) -> Task:
    """The task of a config, with the teacher's sizes filled in, so that the student can be read when the teacher is
    gone, and its step or hash, so that a restart learns from the same.

    Raises what its base does, ConfigError for a teacher that is not there or does not fit, and DataError for what is
    stored of other samples.
    """
    settings = _settings(cfg)
    if settings.stored is not None:
        store = Store(locate(settings.stored))
        model = dataclasses.replace(cfg.model, vocab=cfg.model.vocab or store.manifest.vocab)
        return taught(_base(cfg).task(dataclasses.replace(cfg, model=model)), store)
    teacher = group.broadcast("the teacher", pinned(settings.teacher, setting=_SETTING))
    theirs = model_of(teacher, setting=_SETTING)
    filled = dataclasses.replace(settings, teacher=teacher, model=theirs)
    model = dataclasses.replace(cfg.model, vocab=cfg.model.vocab or theirs.vocab)
    cfg = dataclasses.replace(cfg, model=model, train=dataclasses.replace(cfg.train, distill=filled))
    task = _base(cfg).task(cfg)
    data = next(iter(task.cfg.data.sources.values())).path
    task = distilled(task, read_manifest(locate(data)).tokenizer_hash)
    assert task.frozen is not None
    task.frozen.start.check()
    return task


def without_data(cfg: Config) -> Task:
    """The task as far as it is known without data, and without what is stored."""
    settings, task = _settings(cfg), _base(cfg).without_data(cfg)
    return task if settings.stored is not None else distilled(task)


def has_files(workdir: epath.Path) -> bool:
    """Whether the tokenizer of a work directory is there and undamaged."""
    return pretrain.has_tokenizer(workdir)


# From a teacher, or from what it said -----------------------------------------------------------------------------


def distilled(task: Task, tokenizer_hash: str | None = None) -> Task:
    """The task of a language model, learned from a teacher with the tokenizer of this hash, if one is given.

    Raises ConfigError for a teacher that does not fit.
    """
    cfg, settings = task.cfg, _settings(task.cfg)
    assert task.language is not None and task.frozen is None, "a student is a whole model"
    theirs = settings.model or model_of(settings.teacher, setting=_SETTING)
    _check_vocab(cfg, f"{_SETTING}={settings.teacher}", theirs.vocab)
    teacher = architectures.build(theirs)
    flops = sequence_flops(teacher, cfg.data.seq_len)  # of which a forward pass is a third
    cost = task.cost._replace(
        flops_causal=task.cost.flops_causal + flops.causal // 3, flops_full=task.cost.flops_full + flops.full // 3
    )

    def said(frozen: Params, batch: Batch) -> Output:
        return output(teacher, jax.lax.stop_gradient(frozen), batch)[0]

    return task._replace(
        objective=objective(task, said),
        frozen=Frozen(
            teacher.spec, read_from(settings.teacher, theirs, teacher.spec, tokenizer_hash, setting=_SETTING)
        ),
        cost=cost,
        evaluations={name: _alone(evaluate) for name, evaluate in task.evaluations.items()},
        sample=task.sample and _alone(task.sample),
    )


def taught(task: Task, store: Store) -> Task:
    """The task of a language model, learned from what a teacher said. Raises what `distill` does."""
    cfg, settings, manifest = task.cfg, _settings(task.cfg), store.manifest
    assert task.source is not None
    where = f"train.distill.stored={settings.stored}"
    _check_vocab(cfg, where, manifest.vocab)
    if manifest.temperature != settings.temperature:
        raise ConfigError(
            f"{where} was said at train.distill.temperature={manifest.temperature}, not {settings.temperature}; set "
            "what it has, or run lmjax teach with this config"
        )
    if manifest.samples < (needed := cfg.train.steps * cfg.train.batch):
        raise ConfigError(
            f"{where} holds {manifest.samples:,} samples, and the run reads {needed:,}; continue it by lmjax teach"
        )
    B, T, K = cfg.train.batch, cfg.data.seq_len, manifest.top
    places = {"likeliest_BTK": np.zeros((B, T, K), np.int32), "logp_BTJ": np.zeros((B, T, K + 1), np.float32)}

    def said(frozen: Params, batch: TaughtBatch) -> Likeliest:
        return Likeliest(batch.likeliest_BTK, batch.logp_BTJ)

    return task._replace(
        objective=objective(task, said),
        batch=TaughtBatch(**vars(task.batch), **places),
        source=functools.partial(TaughtSource, task.source, store, B),
        about={**task.about, "teacher": manifest.teacher},
    )


def _check_vocab(cfg: Config, where: str, vocab: int | None) -> None:
    if vocab != cfg.model.vocab:
        raise ConfigError(
            f"{where} tells {vocab} tokens apart, and model.vocab={cfg.model.vocab}; leave model.vocab unset"
        )


# What is minimized ------------------------------------------------------------------------------------------------


def objective(task: Task, said: Said) -> Objective:
    """The objective of the task, the labels', with what the teacher says in it.

    The metric `loss` is that of the labels, `divergence` that from the teacher.
    """
    cfg, settings = task.cfg, _settings(task.cfg)
    student = architectures.build(cfg.model, microbatches=cfg.train.microbatches)

    def loss(params: Params, frozen: Params, batch: Batch, keys_B: Keys, hyper: Hyper) -> tuple[Any, Metrics]:
        ours, layer_metrics = output(student, params, batch, keys_B=keys_B, scalars=hyper)
        far_BT, logp_BT, correct_BT = token_divergences(
            said(frozen, batch),
            ours,
            batch.targets_BT,
            divergence=settings.divergence,
            temperature=settings.temperature,
            chunk=cfg.train.loss.chunk,
        )
        weight = batch.weights_BT.sum()
        far, nll, correct = ((x_BT * batch.weights_BT).sum() for x_BT in (far_BT, -logp_BT, correct_BT))
        minimized = settings.share * settings.temperature**2 * far + (1 - settings.share) * nll
        metrics = {"loss": (nll, weight), "accuracy": (correct, weight), "divergence": (far, weight), **layer_metrics}
        return minimized, metrics

    return task.objective._replace(loss=loss)


def output(model: Model, params: Params, batch: Batch, **training: Any) -> tuple[Output, Metrics]:
    """What the logits of a batch are made of, and the metrics of layers."""
    places = {"positions_BT": batch.positions_BT, "segments_BT": batch.segments_BT}
    x_BTD, _, metrics = model.hidden(params, batch.tokens_BT, **places, **training)
    return Output(model.unembed, model.head(params), x_BTD), metrics


def _settings(cfg: Config) -> DistillConfig:
    found = cfg.train.distill
    if found is None or (found.stored is None) == (found.teacher == ""):
        raise ConfigError(
            f"task=distill needs {_SETTING}, another run or the directory of a Hugging Face checkpoint, or else "
            "train.distill.stored, what lmjax teach has written; set one of them"
        )
    if cfg.train.loss.z_weight or cfg.train.loss.name != "cross_entropy":
        raise ConfigError("train.loss.z_weight and train.loss.name have no part in task=distill; leave them out")
    if cfg.model.moe.experts is not None:
        raise ConfigError("task=distill trains dense models; leave model.moe out")
    return found


def _base(cfg: Config) -> Base:
    if cfg.data.documents == "whole":
        return Base(instruct.instruct, instruct.without_data)
    return Base(pretrain.pretrain, pretrain.without_data)


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The student by itself: what is frozen is no part of it."""
    return lambda params, frozen, **named: function(params, {}, **named)
