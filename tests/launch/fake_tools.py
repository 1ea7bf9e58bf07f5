"""Stand-ins for the command-line tools of engines: each notes how it was called, and says what a test wants."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

SLURM = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        highest=0
        for CODE in $CODES; do export CODE; "$@"; code=$?; highest=$((code > highest ? code : highest)); done
        exit $highest""",
    "scontrol": 'echo "$@"',
}
"""Of what Slurm's script calls as far as it matters here: `srun` returns the highest code of all processes, of which
each ends with its own of $CODES."""


def install(folder: Path, programs: Mapping[str, str]) -> None:
    """Shell programs by name, to be put on a PATH."""
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)


class Tools:
    """The only programs of these names on the PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.calls_file = folder, folder / "calls"
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def say(self, name: str, text: str = "", code: int = 0) -> None:
        """From now on `name` prints this."""
        (self.folder / f"{name}.out").write_text(text)
        noted = f'echo "{name} $*" >> {self.calls_file}\ncat {self.folder}/{name}.out\nexit {code}'
        install(self.folder, {name: noted})

    def calls(self) -> list[str]:
        """Since the last look."""
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return calls
