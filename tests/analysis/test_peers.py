"""What `analysis.bench` compares lmjax with does the same work: the same losses from the same weights."""

import dataclasses
from typing import Any

import pytest

from analysis.bench import plain_peer, speed
from lmjax.config import Config

pytestmark = pytest.mark.usefixtures("quick_compilation")
FORMS: dict[str, dict[str, Any]] = {
    "mini-GPT": {"norm_position": "post", "embed_norm": True, "bias": True, "activation": "relu"},
    "GPT-2": {"norm_position": "pre", "embed_norm": False, "bias": True, "activation": "gelu"},
    "no biases": {"norm_position": "pre", "embed_norm": True, "bias": False, "activation": "gelu"},
}


@pytest.fixture(params=FORMS)
def cfg(request: pytest.FixtureRequest) -> Config:
    cfg = speed.without_dropout(speed.read_config("tiny", batch=2))
    small = {"layers": 2, "embed": 16, "heads": 2, "mlp": 24, "context": 8}
    optimizer = dataclasses.replace(cfg.optimizer, learning_rate=0.01, clip_norm=0.5)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, **small, **FORMS[request.param]),
        data=dataclasses.replace(cfg.data, seq_len=8),
        optimizer=optimizer,
    )


def losses(work: speed.Work) -> list[float]:
    return [float(work(steps)) for steps in (1, 2, 3)]  # type: ignore[arg-type]


def test_peers_have_the_losses_of_lmjax(cfg: Config) -> None:
    ours = losses(speed.train_steps(cfg))
    assert abs(ours[2] - ours[0]) > 0.01  # of other batches, and of weights that have changed
    plain = plain_peer.train_steps(cfg)
    assert plain is not None
    assert losses(plain) == pytest.approx(ours, abs=1e-4)
    if torch := speed.load_peer("torch"):
        assert losses(torch.train_steps(cfg, compiled=False)) == pytest.approx(ours, abs=1e-4)
    if (keras := speed.load_peer("keras")) and (work := keras.train_steps(cfg)):  # its losses are means over steps
        assert work(1) == pytest.approx(ours[0], abs=1e-4)
