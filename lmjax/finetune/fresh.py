"""Weights that are drawn anew where others are taken from trained ones: a new head, tables for another tokenizer."""

from collections.abc import Mapping
from typing import Any

import jax

from lmjax.errors import ConfigError
from lmjax.finetune.select import matching
from lmjax.tasks.start import Start, drawn
from lmjax.tasks.task import Task
from lmjax.weights import Params, by_path, initialize, merge, nested


def with_fresh(task: Task) -> Task:
    """The task starting with the weights that `tune.fresh` names drawn as if nothing were given for them.

    Raises ConfigError for patterns that match nothing, and where nothing is taken from trained weights at all.
    """
    paths = matching(task.spec, task.cfg.tune.fresh, "tune.fresh")
    if task.start.without is None:
        raise ConfigError("tune.fresh: all weights are drawn anew without train.init_from; set that, or leave it out")
    taken, weights = task.start.without(paths), by_path(task.spec)
    fresh = drawn(lambda key, scalars: initialize(nested({path: weights[path] for path in paths}), key))

    def make(key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        asked = by_path(shardings)
        new = {path: one for path, one in asked.items() if path in paths}
        old = {path: one for path, one in asked.items() if path not in paths}
        start: Params = taken(key, scalars, nested(old)) if old else {}
        return merge(start, fresh(key, scalars, nested(new))) if new else start

    return task._replace(start=Start(make, taken.check, taken.digest))
