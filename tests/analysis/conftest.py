"""Published sweeps for comparison with outside truth; they live beside the checkout and are never part of it."""

import json
from pathlib import Path

import pytest

SWEEPS = Path(__file__).resolve().parents[3] / "shared" / "scaling"


@pytest.fixture(scope="session")
def sweeps() -> Path:
    if not (SWEEPS / "expected_dev.json").is_file():
        pytest.skip(f"published sweeps are not at {SWEEPS}")
    return SWEEPS


@pytest.fixture(scope="session")
def expected(sweeps):
    tests = json.loads((sweeps / "expected_dev.json").read_text())["tests"]
    return {test["id"]: test["expected"] for test in tests}
