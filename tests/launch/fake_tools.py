"""Stand-ins for the command-line tools of engines: each notes how it was called, and says what a test wants."""

import os
from pathlib import Path

import pytest


class Tools:
    """The only programs of these names on the PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.calls_file = folder, folder / "calls"
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def say(self, name: str, text: str = "", code: int = 0) -> None:
        """From now on `name` prints this."""
        (self.folder / f"{name}.out").write_text(text)
        script = f'#!/bin/bash\necho "{name} $*" >> {self.calls_file}\ncat {self.folder}/{name}.out\nexit {code}\n'
        (self.folder / name).write_text(script)
        (self.folder / name).chmod(0o755)

    def calls(self) -> list[str]:
        """Since the last look."""
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return calls
