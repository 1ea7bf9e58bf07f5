"""Distillation: a student learns what its teacher holds probable next, beside the labels or in place of them.

    loss = share T^2 D(p, q) + (1 - share) (-log q(target))

with the teacher's distribution p and the student's q, both at temperature T in D, one of `losses.DIVERGENCES` (Hinton
et al. 2015, arXiv:1503.02531, section 2, where T^2 comes from). Text is read as in pretraining, conversations as in
instruction tuning, of which only what is scored counts. The teacher is frozen, and no part of what is trained.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from lmjax.config import Config, from_json
from lmjax.data.batch import Batch
from lmjax.data.store.manifest import read_manifest
from lmjax.data.store.shards import TOKENIZER
from lmjax.data.tokenizers.load import saved_hash
from lmjax.errors import ConfigError
from lmjax.finetune import instruct
from lmjax.losses import Output, token_divergences
from lmjax.metrics import Metrics
from lmjax.models import architectures
from lmjax.models.config import ModelConfig
from lmjax.models.flops import sequence_flops
from lmjax.models.model import Model
from lmjax.optim.schedules import Hyper
from lmjax.record import checkpoint
from lmjax.record.files import locate
from lmjax.record.steps import origin_checkpoint, parse_origin
from lmjax.tasks import pretrain
from lmjax.tasks.start import Start, from_run
from lmjax.tasks.task import Frozen, Task
from lmjax.train.config import DistillConfig
from lmjax.train.objective import Keys, Objective
from lmjax.weights import Params, abstract, part

_SETTING = "train.distill.teacher"


class Base(NamedTuple):
    """What the student would be trained by without a teacher."""

    task: Callable[[Config], Task]
    without_data: Callable[[Config], Task]


def distill(cfg: Config) -> Task:
    """The task of a config, the teacher's sizes filled in, so that the student can be read when the teacher is gone.

    Raises what its base does, and ConfigError for a teacher that is not there or does not fit.
    """
    settings = _settings(cfg)
    origin_checkpoint(_SETTING, settings.teacher)
    filled = dataclasses.replace(settings, model=_teacher_model(settings))
    task = _base(cfg).task(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, distill=filled)))
    workdir, _ = parse_origin(_SETTING, settings.teacher)
    data = next(iter(task.cfg.data.sources.values())).path
    if saved_hash(workdir / TOKENIZER) != read_manifest(locate(data)).tokenizer_hash:
        raise ConfigError(
            f"{_SETTING}={settings.teacher} was trained with another tokenizer than the data's; prepare them with "
            f"--tokenizer-file={workdir / TOKENIZER}"
        )
    return distilled(task)


def without_data(cfg: Config) -> Task:
    """The task as far as it is known without data."""
    _settings(cfg)
    return distilled(_base(cfg).without_data(cfg))


def has_files(workdir: epath.Path) -> bool:
    """Whether the tokenizer of a work directory is there and undamaged."""
    return pretrain.has_tokenizer(workdir)


def distilled(task: Task) -> Task:
    """The task of a language model, learned from a teacher. Raises ConfigError for a teacher that does not fit."""
    cfg, settings, language = task.cfg, _settings(task.cfg), task.language
    assert language is not None and task.frozen is None, "a student is a whole model"
    theirs = _teacher_model(settings)
    if theirs.vocab != cfg.model.vocab:
        raise ConfigError(
            f"{_SETTING}={settings.teacher} tells {theirs.vocab} tokens apart, and model.vocab={cfg.model.vocab}: "
            "leave model.vocab unset, and prepare the data with the teacher's tokenizer"
        )
    teacher = architectures.build(theirs)
    student = architectures.build(cfg.model, microbatches=cfg.train.microbatches)
    flops = sequence_flops(teacher, cfg.data.seq_len)  # of which a forward pass is a third
    cost = task.cost._replace(
        flops_causal=task.cost.flops_causal + flops.causal // 3, flops_full=task.cost.flops_full + flops.full // 3
    )
    return task._replace(
        objective=objective(task.objective, student, teacher, settings, chunk=cfg.train.loss.chunk),
        frozen=Frozen(teacher.spec, _start(settings.teacher, teacher)),
        cost=cost,
        language=language._replace(weights=lambda frozen, params: params, needs_frozen=False),
        evaluations={name: _alone(evaluate) for name, evaluate in task.evaluations.items()},
        sample=task.sample and _alone(task.sample),
    )


def objective(base: Objective, student: Model, teacher: Model, cfg: DistillConfig, *, chunk: int) -> Objective:
    """The objective of `base`, the labels', with what the teacher says in it; the `frozen` weights are the teacher's.

    The metric `loss` is that of the labels, `divergence` that from the teacher.
    """

    def output(model: Model, params: Params, batch: Batch, **training: Any) -> tuple[Output, Metrics]:
        places = {"positions_BT": batch.positions_BT, "segments_BT": batch.segments_BT}
        x_BTD, _, metrics = model.hidden(params, batch.tokens_BT, **places, **training)
        return Output(model.unembed, model.head(params), x_BTD), metrics

    def loss(params: Params, frozen: Params, batch: Batch, keys_B: Keys, hyper: Hyper) -> tuple[Any, Metrics]:
        theirs, _ = output(teacher, jax.lax.stop_gradient(frozen), batch)
        ours, layer_metrics = output(student, params, batch, keys_B=keys_B, scalars=hyper)
        far_BT, logp_BT, correct_BT = token_divergences(
            theirs, ours, batch.targets_BT, divergence=cfg.divergence, temperature=cfg.temperature, chunk=chunk
        )
        weight = batch.weights_BT.sum()
        far, nll, correct = ((x_BT * batch.weights_BT).sum() for x_BT in (far_BT, -logp_BT, correct_BT))
        minimized = cfg.share * cfg.temperature**2 * far + (1 - cfg.share) * nll
        metrics = {"loss": (nll, weight), "accuracy": (correct, weight), "divergence": (far, weight), **layer_metrics}
        return minimized, metrics

    return base._replace(loss=loss)


def _settings(cfg: Config) -> DistillConfig:
    found = cfg.train.distill
    if found is None or "@" not in found.teacher:
        raise ConfigError(
            f"{_SETTING}={'' if found is None else found.teacher}: task=distill needs a run to learn from, and its "
            "step, so that a restart learns from the same: WORKDIR@STEP"
        )
    if cfg.train.loss.z_weight or cfg.train.loss.name != "cross_entropy":
        raise ConfigError("train.loss.z_weight and train.loss.name have no part in task=distill; leave them out")
    if cfg.model.moe.experts is not None:
        raise ConfigError("task=distill trains dense models; leave model.moe out")
    return found


def _teacher_model(cfg: DistillConfig) -> ModelConfig:
    return cfg.model or from_json(parse_origin(_SETTING, cfg.teacher)[0] / "config.json").model


def _base(cfg: Config) -> Base:
    if cfg.data.documents == "whole":
        return Base(instruct.instruct, instruct.without_data)
    return Base(pretrain.pretrain, pretrain.without_data)


def _start(teacher: str, model: Model) -> Start:
    """The weights of the teacher's run."""

    def start(key: jax.Array, scalars: Any, shardings: Any) -> Params:
        shapes = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            part(abstract(model.spec), shardings),
            shardings,
        )
        saved = origin_checkpoint(_SETTING, teacher)
        print(f"learning from {saved}")
        return checkpoint.restore_weights(saved, shapes, whole=False)[0]

    def check() -> None:
        origin_checkpoint(_SETTING, teacher)

    return Start(start, check, from_run(teacher, model.spec).digest)


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The student by itself: what is frozen is no part of it."""
    return lambda params, frozen, **named: function(params, {}, **named)
