"""The examples of docs/change_one_line.md work as written, and each touches one file."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("quick_compilation")

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

# A mixer with a state of its own decodes what it computes over whole rows, whatever padding is beside them; and its
# FLOPs, as counted, are those of the program.
MIXER = """
import jax, jax.numpy as jnp, numpy as np
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate_ids
from lmjax.models import architectures
from lmjax.models.config import ModelConfig
from lmjax.models.flops import program_flops
from lmjax.weights import count, initialize

cfg = ModelConfig(vocab=31, layers=3, embed=16, mlp=32, pattern=("gla", "global"))
model = architectures.build(cfg)
params = jax.tree.map(lambda w: 2 * w, initialize(model.spec, jax.random.key(0)))
prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
settings = GenerateConfig(tokens=6, temperature=0)
found = generate_ids(model, params, prompts, settings, endoftext=30, vocab=31, stops=(-1,))
logits = jax.jit(model.logits)
for prompt, ids in zip(prompts, found):
    row = np.zeros((1, 12), np.int32)
    row[0, : len(prompt) + len(ids)] = prompt + ids
    likeliest = np.argmax(logits(params, row)[0], axis=-1)
    assert list(likeliest[len(prompt) - 1 :][: len(ids)]) == ids, (prompt, ids)
tokens_BT = jnp.zeros((1, 8), jnp.int32)
forward = program_flops(lambda params: model.logits(params, tokens_BT), params)
assert forward == 2 * count(model.spec).matmul * 8 + model.mixing_flops(8, causal=False), forward
"""

MIXTURE = """
from lmjax.data.config import DataConfig
from lmjax.data.mixture import MIXTURES

assert MIXTURES[DataConfig(mixture="by_root").mixture]([1.0, 2.0], [4, 9]) == [2.0, 6.0]
"""


def apply(section: str, package: Path) -> str:
    """Make a section's change in a copy of the package; returns the setting that selects it."""
    path, registry = (
        re.search(r"In (?:the new file )?`(.+?\.py)`", section)[1],
        re.search(r"a line in `(\w+)`", section)[1],
    )
    code, line = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert line.count("\n") == 1
    if elsewhere := re.search(r"after `(from .+?)`, a line in `\w+` of `(.+?\.py)`", section):
        assert not (package / path).exists()
        (package / path).write_text(code)
        path, code = elsewhere[2], f"{elsewhere[1]}\n"
    source = (package / path).read_text()
    before, opening, after = re.split(rf"^({registry}\b.*\{{\n)", source, maxsplit=1, flags=re.MULTILINE)
    (package / path).write_text(f"{before}{code}\n\n{opening}{line}{after}")
    return re.search(r"--config\.(\S+?)`", section)[1]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.split("\n")[0])
def test_each_change_touches_one_file(section: str, tmp_path: Path) -> None:
    """And adds one at most."""
    shutil.copytree(ROOT / "lmjax", tmp_path / "lmjax")
    apply(section, tmp_path)
    there = {path: ROOT / path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")}
    assert sum(old.exists() and new.read_text() != old.read_text() for new, old in there.items()) == 1
    assert sum(not old.exists() for old in there.values()) == ("new file" in section)


def test_the_changes_work(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lmjax", tmp_path / "lmjax")
    settings = [apply(section, tmp_path) for section in SECTIONS]
    models = [setting for setting in settings if not setting.startswith("data.")]
    for program, arguments in ((PROGRAM, models), (MIXER, []), (MIXTURE, [])):
        command = [sys.executable, "-c", program, *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
