from pathlib import Path

import pytest

from tests.launch.fake_tools import Tools


@pytest.fixture
def tools(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Tools:
    return Tools(tmp_path_factory.mktemp("tools"), monkeypatch)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    for name in ("a", "b"):
        (directory / name).mkdir()
        for number in range(8):
            text = " ".join(f"{name}{number * word % 97}" for word in range(300))
            (directory / name / f"{number}.txt").write_text(text)
    return directory
