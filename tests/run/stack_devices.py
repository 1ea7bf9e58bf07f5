"""Run by test_stack.py on eight fake devices."""

from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath

from lmjax import config
from lmjax.errors import DONE
from lmjax.record import inspect
from lmjax.run import run, stack
from lmjax.run.stack import Inputs, Member, Outputs, SharedStep, SideBySide, Stacked

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = Path(__file__).parents[1] / "tiny_config.py"
SETTINGS = (
    "train.steps=3",
    "train.sample.prompts=()",
    "train.evaluate_every=None",
    "model.layers=1",
    "optimizer.schedule.warmup=1",
)


@pytest.mark.parametrize("kind", [SideBySide, Stacked])
def test_runs_are_dealt_out_to_the_devices(corpus: Path, tmp_path: Path, kind: type[SharedStep]) -> None:
    """Nine of them: one device has two, which step as one where they are stacked."""
    used: dict[int, set[jax.Device]] = {}

    class Watched(kind):  # type: ignore[misc, valid-type]
        def __call__(self, number: int, inputs: Inputs) -> Outputs:
            given = devices(inputs)  # before the step takes them
            made = super().__call__(number, inputs)
            used.setdefault(number, set()).update(given, devices(made))
            return made

    cfgs = [config.load(f"{CONFIG}:{corpus}", [*SETTINGS, f"train.seed={seed}"]) for seed in range(9)]
    members = [Member(cfg, epath.Path(tmp_path / str(i)), run.Options()) for i, cfg in enumerate(cfgs)]
    assert stack.train(members, Watched) == DONE
    assert used == {number: {jax.devices()[number % 8]} for number in range(9)}
    with jax.default_device(jax.devices()[0]):
        assert run.run(cfgs[4], tmp_path / "alone", run.Options()) == DONE
    assert hashes(tmp_path / "4") == hashes(tmp_path / "alone") or kind is Stacked


def devices(arrays: Any) -> set[jax.Device]:
    return {device for x in jax.tree.leaves(arrays) for device in x.devices()}


def hashes(directory: Path) -> dict[str, Any]:
    return inspect.inspect(directory, hashes=True)["hashes"]
