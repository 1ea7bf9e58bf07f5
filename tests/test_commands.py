"""What commands import: whoever calls them waits for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRY_RUN = ["train", f"--config={ROOT / 'configs' / 'mini_gpt.py'}", "--workdir=w", "--dry-run"]

UNNEEDED = {
    "help": (["--help"], {"pydantic", "numpy", "etils", "fsspec", "jax", "lmjax.config"}),
    "dry run": (
        DRY_RUN,
        {"grain", "orbax", "tensorstore", "sentencepiece", "tokenizers", "wandb", "lmjax.tasks.benchmarks"},
    ),
}

# That a process starts itself again for another allocator is for those that train.
WITNESS = """
import os, sys
os.execve = None
from lmjax.__main__ import main
try:
    main()
except SystemExit as end:
    print(end.code, *sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(("arguments", "unneeded"), UNNEEDED.values(), ids=UNNEEDED)
def test_commands_do_not_wait_for_what_they_do_not_need(
    arguments: list[str], unneeded: set[str], tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", WITNESS, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    code, *imported = done.stderr.split()
    assert code == "0" and "lmjax.commands" in imported, done.stderr
    assert not unneeded & {*imported}
