import pytest

from tests.launch.fake_tools import Tools


@pytest.fixture
def tools(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Tools:
    return Tools(tmp_path_factory.mktemp("tools"), monkeypatch)
