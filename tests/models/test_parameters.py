"""N in closed form is N of the declared weights, whatever the model is made of."""

import dataclasses
from pathlib import Path

import pytest

from lmjax.config import load
from lmjax.errors import ConfigError
from lmjax.models.architectures import ARCHITECTURES, build
from lmjax.models.config import ModelConfig
from lmjax.models.parameters import parameters
from lmjax.weights import count

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = ["quickstart.py", "shakespeare_char.py", "mini_gpt.py", "own_text.py:text", "moe.py", "moe.py:dense"]
PRESETS += [f"gpt2.py:{size}" for size in ("124m", "350m", "774m", "1558m")]
PRESETS += [f"llama.py:{size}" for size in ("60m", "150m", "300m", "1b", "3b", "8b", "70b")]


def check(cfg: ModelConfig) -> None:
    counted = count(build(cfg).spec)
    found = parameters(cfg)
    assert {name: found[name] for name in ("total", "non_embedding", "matmul", "active")} == dataclasses.asdict(counted)
    assert cfg.vocab is not None and found["layers"] == counted.matmul - cfg.vocab * cfg.embed
    assert parameters(dataclasses.replace(cfg, vocab=None)) == {"layers": found["layers"]}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_has_the_parameters_of_its_weights(cfg: ModelConfig, architecture: str) -> None:
    check(dataclasses.replace(cfg, architecture=architecture))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_the_parameters_of_its_weights(preset: str) -> None:
    model = load(str(CONFIGS / preset)).model
    check(dataclasses.replace(model, vocab=model.vocab or 1000))


def test_a_mixer_that_is_not_counted_is_refused(cfg: ModelConfig) -> None:
    """Rather than taken for attention, which would give rules a wrong N."""
    cfg = dataclasses.replace(cfg)
    object.__setattr__(cfg, "pattern", ("global", "of_ones_own"))
    with pytest.raises(ConfigError, match="nothing counts the parameters of 'of_ones_own'"):
        parameters(cfg)


def test_published_sizes() -> None:
    assert parameters(load(str(CONFIGS / "gpt2.py:124m")).model)["total"] == 124_439_808
    assert parameters(load(str(CONFIGS / "llama.py:8b")).model)["total"] == 8_030_261_248
