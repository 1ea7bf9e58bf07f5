"""What tests of whole runs share: some text, and a compiled step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax.cells import program
from lmjax.run import assemble
from lmjax.run.assemble import Experiment


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """Runs of one program share it compiled: compiling is most of what so short a run costs."""
    compiled_step = assemble.compiled_step
    steps: dict[str, Any] = {}

    def cached_step(parts: Experiment) -> Any:
        key = program(parts.cfg)
        if key not in steps:
            steps[key] = compiled_step(parts)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "compiled_step", cached_step)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (directory / name).mkdir()
        for number in range(20):
            (directory / name / f"{number}.txt").write_text(" ".join(rng.choice(list("abcdefgh"), 300)))
    return directory
