"""The tasks that `config.task` names."""

from collections.abc import Callable

from lmjax.config import Config
from lmjax.tasks.pretrain import pretrain
from lmjax.tasks.task import Task

TASKS: dict[str, Callable[[Config], Task]] = {
    "pretrain": pretrain,
}
