"""Dropout of attention weights. (Of activations: tests/train/test_step.py.)"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import ConfigError
from lmjax.models import decoder
from lmjax.models.attention.attention import BACKENDS, Mask, Score, attention
from lmjax.models.attention.mixer import pair_dropout
from lmjax.models.config import ModelConfig
from lmjax.models.dropout import PairDropout, bernoulli
from lmjax.train.step import sample_keys
from lmjax.weights import initialize

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, N, K, H = 3, 128, 4, 2, 8
RATE = 0.25
CFG = ModelConfig(vocab=31, context=16, layers=3, embed=16, heads=4, kv_heads=2, mlp=24, attention_dropout=RATE)
TOKENS_BT = np.random.default_rng(0).integers(31, size=(4, 16)).astype(np.int32)
IDS_B = np.arange(4)


def qkv() -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, T, heads, H)), jnp.float32) for heads in (N, K, K)]


def score(seed: int = 0) -> Score:
    return Score(H**-0.5, dropout=PairDropout(RATE, sample_keys(jnp.uint32(seed), jnp.arange(B))))


def test_what_is_kept_is_scaled_up_and_every_head_and_pair_has_its_own_draw() -> None:
    ones_BNTS = jnp.ones((B, N, T, T))
    drop = score().dropout
    assert drop is not None
    kept = np.asarray(drop.apply(ones_BNTS))
    np.testing.assert_allclose(np.unique(kept), [0, 1 / (1 - RATE)], rtol=1e-6)
    assert kept.mean() == pytest.approx(1, abs=0.005)
    masks = [kept[b, n] > 0 for b, n in np.ndindex(B, N)]
    agree = RATE**2 + (1 - RATE) ** 2  # of independent draws
    for i, one in enumerate(masks):
        assert np.mean(one[1:] == one[:-1]) == pytest.approx(agree, abs=0.02)
        assert all(np.mean(one == other) == pytest.approx(agree, abs=0.02) for other in masks[:i])


def test_a_mask_is_that_of_jax_random() -> None:
    key = jax.random.key(7)
    np.testing.assert_array_equal(bernoulli(key, 0.9, 33, 48), jax.random.bernoulli(key, 0.9, (33, 48)))


def test_on_average_nothing_changes_and_weights_are_dropped_after_the_softmax() -> None:
    """Keys without a difference: each query takes the mean of what it sees, of which a share is left out."""
    q_BTNH, k_BSKH, _ = qkv()
    ones_BSKH = jnp.ones_like(k_BSKH)
    y_BTNH = np.asarray(attention(q_BTNH * 0, k_BSKH, ones_BSKH, Mask(), score()))
    steps = y_BTNH * (1 - RATE) * np.arange(1, T + 1)[:, None, None]  # how many of the keys are kept
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    assert y_BTNH.std() > 0 and y_BTNH.mean() == pytest.approx(1, abs=0.01)
    many = jax.jit(jax.vmap(lambda seed: attention(*qkv(), Mask(), score(seed))))(jnp.arange(40, dtype=jnp.uint32))
    off = many.mean(axis=0) - attention(*qkv(), Mask(), Score(H**-0.5))
    assert float(jnp.sqrt(jnp.mean(off**2))) < 2 * float(many.std(axis=0).mean()) / 40**0.5


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_a_backend_that_cannot_drop_refuses(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"model.attention={backend} .*"):
        attention(*qkv(), Mask(), score(), backend)
    monkeypatch.setattr("lmjax.models.attention.attention.FASTEST", {"cpu": (backend,)})
    np.testing.assert_array_equal(attention(*qkv(), Mask(), score()), attention(*qkv(), Mask(), score(), "reference"))


def hidden(cfg: ModelConfig, ids_B: np.ndarray | None, tokens_BT: np.ndarray = TOKENS_BT) -> jax.Array:
    model = decoder.build(cfg)
    params = initialize(model.spec, jax.random.key(0))
    keys_B = None if ids_B is None else sample_keys(jnp.uint32(3), jnp.asarray(ids_B))
    return jax.jit(model.hidden)(params, tokens_BT, keys_B=keys_B)[0]


def test_masks_belong_to_samples_and_training() -> None:
    order = np.random.default_rng(1).permutation(4)
    x_BTD = hidden(CFG, IDS_B)
    np.testing.assert_array_equal(hidden(CFG, IDS_B[order], TOKENS_BT[order]), x_BTD[order])
    assert not np.any(np.all(np.asarray(hidden(CFG, IDS_B + 1) == x_BTD), axis=(1, 2)))
    off = replace(CFG, attention_dropout=0.0)
    for remat in ("none", "full"):
        np.testing.assert_array_equal(hidden(replace(CFG, remat=remat), None), hidden(off, None))
        np.testing.assert_array_equal(hidden(off, IDS_B), hidden(off, None))


def test_every_layer_drops_its_own() -> None:
    keys_B, rates = sample_keys(jnp.uint32(0), jnp.arange(1)), {"attention_dropout": CFG.attention_dropout}
    drops = [pair_dropout(keys_B, CFG, rates, layer) for layer in range(3)]
    masks = [tuple(np.asarray(drop.apply(jnp.ones((1, 1, 8, 8)))).ravel()) for drop in drops if drop is not None]
    assert len(set(masks)) == 3
