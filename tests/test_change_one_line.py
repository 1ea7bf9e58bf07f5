"""The examples of docs/change_one_line.md work as written, and each touches one file."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "change_one_line.md").read_text(), flags=re.MULTILINE)[1:]

# A few updates of a tiny model with each setting, beside one without any: a setting must make a difference.
PROGRAM = """
import sys
import numpy as np
from lmjax import config
from lmjax.run import assemble
from lmjax.tasks.pretrain import without_data
from lmjax.data.batch import Batch

def last_loss(*settings):
    tree = config.default_config()
    tree.model.vocab, tree.model.embed, tree.model.mlp, tree.model.layers = 31, 16, 32, 1
    tree.optimizer.schedule.warmup = 1
    for setting in settings:
        config._apply_override(tree, setting)
    parts = assemble.assemble(without_data(config.parse(tree.to_dict())))
    ids = np.random.default_rng(0).integers(0, 31, (4, 13)).astype(np.int32)
    batch = Batch(ids[:, :-1], ids[:, 1:], np.ones((4, 12), np.float32), np.arange(4, dtype=np.int32))
    state, step = assemble.initial_state(parts), assemble.compiled_step(parts)
    for _ in range(3):
        state, metrics = step(state, {}, batch)
    return float(metrics["loss"][0])

default = last_loss()
for setting in sys.argv[1:]:
    changed = last_loss(setting)
    assert np.isfinite(changed) and changed != default, (setting, changed, default)
"""


def apply(section: str, package: Path) -> str:
    """Make a section's change in a copy of the package; returns the setting that selects it."""
    path, registry = re.search(r"In `(.+?\.py)`", section)[1], re.search(r"a line in `(\w+)`", section)[1]
    function, line = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert line.count("\n") == 1
    source = (package / path).read_text()
    before, opening, after = re.split(rf"^({registry}\b.*\{{\n)", source, maxsplit=1, flags=re.MULTILINE)
    (package / path).write_text(f"{before}{function}\n\n{opening}{line}{after}")
    return re.search(r"--config\.(\S+?)`", section)[1]


def files_that_differ(package: Path) -> int:
    return sum(path.read_text() != (ROOT / path.relative_to(package)).read_text() for path in package.rglob("*.py"))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.split("\n")[0])
def test_each_change_touches_one_file(section: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lmjax", tmp_path / "lmjax")
    apply(section, tmp_path)
    assert files_that_differ(tmp_path) == 1


def test_the_changes_work(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lmjax", tmp_path / "lmjax")
    settings = [apply(section, tmp_path) for section in SECTIONS]
    command = [sys.executable, "-c", PROGRAM, *settings]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
