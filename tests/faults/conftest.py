"""Some text, and a run that was trained on it undisturbed: tests copy them."""

from pathlib import Path

import numpy as np
import pytest

from tests.faults.black_box import train


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def write_corpus(directory: Path) -> Path:
    """Text for tiny.py."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (directory / name).mkdir(parents=True)
        for number in range(20):
            (directory / name / f"{number}.txt").write_text(" ".join(rng.choice(list("abcdefgh"), 300)))
    return directory


@pytest.fixture(scope="session")
def whole(corpus: Path) -> Path:
    """A finished run, of 12 steps, that nothing happened to."""
    train(corpus, corpus / "whole").done()
    return corpus / "whole"
