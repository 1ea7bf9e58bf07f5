"""Prepared data sets and reference data for the tests of lmjax.data."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.prepare.prepare import prepare

REFERENCE = Path(__file__).parents[3] / "shared" / "data"

Prepared = Callable[..., Path]


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference data beside the repository; tests that need it are skipped without it."""
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference data at {REFERENCE}")
    return REFERENCE


@pytest.fixture(scope="session")
def persian(reference: Path) -> list[str]:
    """Five classical poets, 200,000 characters of each."""
    return [gzip.decompress(path.read_bytes()).decode()[:200_000] for path in sorted(reference.glob("persian/*.gz"))]


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    """The texts as JSON lines."""
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    """prepared(texts, name="data", **recipe): a data set made of these texts, as bytes unless the recipe says."""

    def make(texts: Sequence[str], name: str = "data", **recipe: Any) -> Path:
        source = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        defaults = {"tokenizer": TokenizerConfig(kind="bytes"), "valid_fraction": 0.0, "workers": 1}
        cfg = PrepareConfig(inputs=(str(source),), **(defaults | recipe))
        prepare(cfg, tmp_path / name, progress=False)
        return tmp_path / name

    return make


@pytest.fixture
def numbered_texts() -> list[str]:
    """200 documents of very different lengths."""
    return [f"document {number}" + f" of {number % 7} words" * (number * 37 % 41) for number in range(200)]
