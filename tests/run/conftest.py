"""What tests of whole runs share."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from lmjax.evaluate import splits
from lmjax.run import assemble
from lmjax.run.assemble import Experiment


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """Runs of the same model and optimizer share their programs: compiling is most of what so short a run costs."""
    compiled_step = assemble.compiled_step
    steps: dict[str, Any] = {}

    def cached_step(parts: Experiment) -> Any:
        cfg = parts.cfg
        key = repr((cfg.model, cfg.optimizer, cfg.train.loss, cfg.train.microbatches))
        if key not in steps:
            steps[key] = compiled_step(parts)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "compiled_step", cached_step)
        patch.setattr(splits, "float32", functools.cache(splits.float32))
        yield
