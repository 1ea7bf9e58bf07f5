"""Loss, bits per byte and accuracy by hand, whatever the batch size, and on a mesh."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from lmjax.data.batch import Batch
from lmjax.errors import DataError
from lmjax.evaluate.likelihood import Evaluation, _score, evaluate, macro_average
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.weights import Params, initialize

pytestmark = pytest.mark.usefixtures("quick_compilation")

V, T, ROWS = 61, 20, 13
MODEL = decoder.build(ModelConfig(vocab=V, layers=2, embed=24, heads=4, mlp=40, embed_init_std=0.5))


@functools.cache
def params() -> Params:
    return initialize(MODEL.spec, jax.random.key(0))


def batches(batch_size: int) -> Iterator[Batch]:
    """The same ROWS windows, the last one ragged, in batches whose last is padded with weight 0."""
    rng = np.random.default_rng(0)
    tokens_BU = rng.integers(V, size=(ROWS, T + 1)).astype(np.int32)
    weights_BT = np.ones((ROWS, T), np.float32)
    weights_BT[-1, 7:] = 0
    padding = -ROWS % batch_size
    tokens_BU, weights_BT = (np.pad(x, ((0, padding), (0, 0))) for x in (tokens_BU, weights_BT))
    for low in range(0, len(tokens_BU), batch_size):
        rows = slice(low, low + batch_size)
        yield Batch(tokens_BU[rows, :-1], tokens_BU[rows, 1:], weights_BT[rows], np.arange(low, low + batch_size))


def run(batch_size: int, chunk: int = 256) -> Evaluation:
    return evaluate(MODEL, params(), batches(batch_size), n_tokens=300, n_bytes=700, chunk=chunk)


def test_by_hand() -> None:
    (batch,) = batches(ROWS)
    logits_BTV = np.asarray(MODEL.logits(params(), batch.tokens_BT), np.float64)
    logp_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))
    logp_BT = np.take_along_axis(logp_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
    scored_BT = batch.weights_BT > 0
    nll, tokens = -logp_BT[scored_BT].sum(), scored_BT.sum()
    correct_BT = logits_BTV.argmax(axis=-1) == batch.targets_BT

    result = run(ROWS)
    assert result.tokens == tokens == (ROWS - 1) * T + 7
    assert result.loss == pytest.approx(nll / tokens, abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert result.accuracy == pytest.approx(correct_BT[scored_BT].mean(), abs=1e-9)
    assert result.coverage == pytest.approx(tokens / 300)
    # What the scored tokens cost in bits, as many times as the split is longer, over its bytes.
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) * (300 / tokens) / 700, abs=1e-6)


def test_bits_per_byte_of_a_whole_split() -> None:
    """With every token scored it is what an arithmetic coder would need, whatever the tokens are."""
    (batch,) = batches(ROWS)
    tokens = int(batch.weights_BT.sum())
    result = evaluate(MODEL, params(), [batch], n_tokens=tokens, n_bytes=1000)
    assert result.coverage == 1
    assert result.bits_per_byte * 1000 == pytest.approx(result.loss * tokens / math.log(2))


def numbers(result: Evaluation) -> dict[str, float]:
    """All of it but the set's digest."""
    return {name: value for name, value in result.numbers().items() if name != "digest"}


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 256), (2, 7), (5, 20), (ROWS, 3), (16, 8)])
def test_the_batch_size_changes_nothing(batch_size: int, chunk: int) -> None:
    reference, other = numbers(run(ROWS)), numbers(run(batch_size, chunk))
    assert other == pytest.approx(reference, rel=1e-6, abs=1e-6)


def test_one_program_per_shape() -> None:
    run(4)
    before = _score._cache_size()
    run(4)
    assert _score._cache_size() == before


def test_a_batch_is_dispatched_before_the_one_before_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: (events.append("read"), device_get(x))[1])

    def source() -> Iterator[Batch]:
        for batch in batches(5):
            events.append("take")
            yield batch

    evaluate(MODEL, params(), source(), n_tokens=300, n_bytes=700)
    assert events == ["take", "take", "read", "take", "read", "read"]


def test_nothing_to_score() -> None:
    with pytest.raises(DataError, match="no token to score"):
        evaluate(MODEL, params(), [], n_tokens=10, n_bytes=10)
    with pytest.raises(DataError, match="no token to score"):
        empty = [dataclasses.replace(batch, weights_BT=0 * batch.weights_BT) for batch in batches(ROWS)]
        evaluate(MODEL, params(), empty, n_tokens=10, n_bytes=10)


def test_macro_average() -> None:
    a = Evaluation(2.0, 0.3, math.exp(2.0), 1.0, 0.5, 0.01, 100, 1.0)
    b = Evaluation(4.0, 0.4, math.exp(4.0), 2.0, 0.3, 0.02, 900, 0.5)
    mean = macro_average({"a": a, "b": b})
    expected = Evaluation(3.0, 0.25, math.exp(3.0), 1.5, 0.4, math.hypot(0.01, 0.02) / 2, 1000, 0.75)
    assert numbers(mean) == pytest.approx(numbers(expected))


# On a mesh --------------------------------------------------------------------------------------------------------

MESH_PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import json, jax
from lmjax.devices.config import MeshConfig
from lmjax.devices.mesh import make_mesh, shardings
from lmjax.devices.place import shard_batch
import test_likelihood as t
mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2))
with jax.set_mesh(mesh):
    params = jax.device_put(t.params(), shardings(t.MODEL.spec, mesh))
    batches = (shard_batch(batch, mesh, 4) for batch in t.batches(4))
    print(json.dumps(t.numbers(t.evaluate(t.MODEL, params, batches, n_tokens=300, n_bytes=700))))
"""


def test_on_a_mesh() -> None:
    """Weights, rows and tokens of a row are spread over devices."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    program = MESH_PROGRAM.format(folder=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(numbers(run(ROWS)), rel=1e-6, abs=1e-6)
