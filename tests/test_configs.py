"""Every config file loads, is what its schema allows, and says what it is for."""

import ast
from pathlib import Path

import pytest

from lmjax.config import load
from lmjax.errors import ConfigError
from lmjax.models import decoder
from lmjax.models.flops import sequence_flops
from lmjax.weights import count

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_configs_load_and_open_with_what_they_reproduce(path: Path) -> None:
    load(str(path))
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    positions = [text.find(f"\n{heading}") for heading in ("Reproduces", "Costs", "Command")]
    assert -1 not in positions and positions == sorted(positions)
    assert f"--config=configs/{path.name}" in text


def test_the_mixture_and_the_dense_model_cost_the_same() -> None:
    """To the FLOP, and in everything that is not the mlp they are one config."""
    mixture, dense = (load(f"{CONFIGS / 'moe.py'}:{arm}", ["model.vocab=257"]) for arm in ("moe", "dense"))
    one, other = (decoder.build(cfg.model) for cfg in (mixture, dense))
    assert sequence_flops(one, 256) == sequence_flops(other, 256)
    assert count(one.spec).active == count(other.spec).active == count(other.spec).total < count(one.spec).total / 2
    assert (mixture.data, mixture.optimizer, mixture.train) == (dense.data, dense.optimizer, dense.train)
    with pytest.raises(ConfigError, match=r"moe\.py:switch: the arms are moe, dense"):
        load(f"{CONFIGS / 'moe.py'}:switch")
