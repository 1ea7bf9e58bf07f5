"""Run by test_run.py with XLA as users have it."""

from pathlib import Path

import pytest

from lmjax import config
from lmjax.errors import DONE, PREEMPTED
from lmjax.process import faults as fault_hooks
from lmjax.record import inspect
from lmjax.run import run
from lmjax.run.trained import evaluate_trained, load_trained
from tests.run.test_run import BATCH, CONFIG, SETTINGS, STEPS, T, losses

pytestmark = pytest.mark.usefixtures("quick_compilation", "compiled_once")


def test_an_average_is_kept_beside_the_same_weights(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a stop, too. It is what is evaluated and read; the weights' own losses stand beside its own."""
    directory, finished, setting = tmp_path / "run", tmp_path / "finished", "train.average_decay=0.9"

    def train(directory: Path, *settings: str, faults: str = "") -> int:
        monkeypatch.setenv("LMJAX_FAULTS", faults)
        monkeypatch.setattr(fault_hooks, "_calls", {})
        return run.run(config.load(f"{CONFIG}:{corpus}", [*SETTINGS, *settings]), directory, run.Options())

    assert train(finished) == DONE
    assert train(directory, setting, faults="terminate@step:7") == PREEMPTED
    assert train(directory, setting) == DONE
    assert train(tmp_path / "whole", setting) == DONE
    hashes, whole, plain = (
        inspect.inspect(place, hashes=True)["hashes"] for place in (directory, tmp_path / "whole", finished)
    )
    assert hashes == whole
    assert {part: hashes[part] for part in plain if part != "hyper"} == {
        part: plain[part] for part in plain if part != "hyper"
    }
    last, expected = losses(directory)[STEPS], losses(finished)[STEPS]
    scored = [name for name in expected if name.startswith("val")]
    assert {name: last[f"raw/{name}"] for name in scored} == {name: expected[name] for name in scored}
    assert all(last[name] != expected[name] for name in scored)
    found = evaluate_trained(
        load_trained(directory), [str(corpus / "a.prepared")], split="valid", batch=BATCH, seq_len=T
    )
    (evaluation,) = found.values()
    assert evaluation.loss == pytest.approx(last["val/a/loss"], rel=1e-5)
