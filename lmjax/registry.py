"""The tasks that `config.task` names."""

from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from lmjax.config import Config
from lmjax.finetune import distill, instruct
from lmjax.finetune.tune import tuned
from lmjax.tasks import pretrain
from lmjax.tasks.task import Task


class Kind(NamedTuple):
    """One kind of training."""

    task: Callable[[Config], Task]
    """What a run trains: data and all."""
    without_data: Callable[[Config], Task]
    """The same as far as it is known without data: enough to compile, to plan and to price it."""
    has_files: Callable[[epath.Path], bool]
    """Whether what `Task.write_files` writes is in a work directory, whole."""


TASKS: dict[str, Kind] = {
    "pretrain": Kind(pretrain.pretrain, pretrain.without_data, pretrain.has_tokenizer),
    "instruct": Kind(instruct.instruct, instruct.without_data, instruct.has_files),
    "distill": Kind(distill.distill, distill.without_data, distill.has_files),
}


def with_data(cfg: Config) -> Task:
    """The task of a config, as `Kind.task` has it, training what `tune` leaves of its weights. Raises what both do."""
    return tuned(TASKS[cfg.task].task(cfg))


def without_data(cfg: Config) -> Task:
    """The same of a config whose vocabulary is known, as `Kind.without_data` has it."""
    return tuned(TASKS[cfg.task].without_data(cfg))
