"""One small untrained model of bytes, which answers whatever it is asked."""

import jax
import pytest

from lmjax.data.tokenizers.alphabets import ByteTokenizer
from lmjax.evaluate.requests import Scorer
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.weights import initialize


@pytest.fixture(scope="session")
def scorer() -> Scorer:
    model = decoder.build(ModelConfig(vocab=257, layers=1, embed=16, heads=2, mlp=24, embed_init_std=0.5))
    return Scorer(model, initialize(model.spec, jax.random.key(1)), ByteTokenizer(), context=96, batch=32)
