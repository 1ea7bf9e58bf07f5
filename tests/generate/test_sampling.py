"""What each rule keeps, against a plain restatement in numpy and Hugging Face; and how often tokens are drawn."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.generate.config import GenerateConfig
from lmjax.generate.sampling import keep_min_p, keep_top_k, keep_top_p, largest, penalize_repetition, sample, truncate

B, V = 5, 37


def random_logits(seed: int = 0, rows: int = B, vocab: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=2.0, size=(rows, vocab)).astype(np.float32)


def softmax(x_BV: np.ndarray) -> np.ndarray:
    e_BV = np.exp(x_BV.astype(np.float64) - x_BV.max(axis=-1, keepdims=True))
    return e_BV / e_BV.sum(axis=-1, keepdims=True)


def kept(logits_BV: jax.Array) -> np.ndarray:
    return np.isfinite(np.asarray(logits_BV))


# Against numpy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 10, V, 1000])
def test_top_k(k: int) -> None:
    logits_BV = random_logits()
    least_B1 = np.sort(logits_BV)[:, -min(k, V)][:, None]
    np.testing.assert_array_equal(keep_top_k(logits_BV, k), np.where(logits_BV >= least_B1, logits_BV, -np.inf))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(p: float) -> None:
    logits_BV = random_logits()
    for row_V, kept_V in zip(logits_BV, kept(keep_top_p(logits_BV, p)), strict=True):
        order = np.argsort(-row_V)
        before = np.concatenate([[0], np.cumsum(softmax(row_V[None])[0][order])[:-1]])
        assert set(np.flatnonzero(kept_V)) == set(order[before < p])


@given(st.lists(st.sampled_from([-np.inf, -3.0, -0.0, 0.0, 1e-30, 2.0, 5.0]), min_size=2, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_ties_and_ruled_out_tokens(values: list[float], data: st.DataObject) -> None:
    """Equal logits share their fate, and a token ruled out before stays so."""
    logits_1V = np.array([values + [1.0] + [-np.inf] * (12 - len(values))], np.float32)
    k, p = data.draw(st.integers(1, 14)), data.draw(st.floats(0.01, 0.99))
    larger_V = (logits_1V[0][None] > logits_1V[0][:, None]).astype(np.float64)
    probabilities_V = softmax(logits_1V)[0]
    finite_V = np.isfinite(logits_1V[0])
    np.testing.assert_array_equal(kept(jax.jit(keep_top_k)(logits_1V, k))[0], finite_V & (larger_V.sum(axis=1) < k))
    mass_V = larger_V @ probabilities_V
    near = np.abs(mass_V - p) < 1e-5
    np.testing.assert_array_equal(kept(jax.jit(keep_top_p)(logits_1V, p))[0] | near, (finite_V & (mass_V < p)) | near)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(p: float) -> None:
    probabilities_BV = softmax(random_logits())
    expected_BV = probabilities_BV >= p * probabilities_BV.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(kept(keep_min_p(random_logits(), p)), expected_BV)


def test_repetition_penalty() -> None:
    logits_BV, seen_BV = random_logits(), np.random.default_rng(1).random((B, V)) < 0.3
    expected_BV = np.where(seen_BV, np.where(logits_BV < 0, logits_BV * 1.3, logits_BV / 1.3), logits_BV)
    np.testing.assert_allclose(penalize_repetition(logits_BV, seen_BV, 1.3), expected_BV, rtol=1e-6)


def test_rules_apply_in_order() -> None:
    """Top-p is of what top-k left, min-p of what both left, all after the temperature."""
    logits_1V = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    cfg = GenerateConfig(temperature=1.0, top_k=3, top_p=0.8)
    assert kept(truncate(logits_1V, cfg)).tolist() == [[True, True, True, False]]  # .4 + .3 are 0.78 of what is left
    cfg = GenerateConfig(temperature=0.5, top_k=3, top_p=0.8)
    assert kept(truncate(logits_1V, cfg)).tolist() == [[True, True, False, False]]  # .16 + .09 are 0.86 of .29


# Against Hugging Face ---------------------------------------------------------------------------------------------


def test_hugging_face_agrees() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits_BV = random_logits(rows=20, vocab=500)
    prompt_BT = np.random.default_rng(2).integers(500, size=(20, 30))
    seen_BV = np.zeros((20, 500), bool)
    np.put_along_axis(seen_BV, prompt_BT, True, axis=1)
    processors: list[Callable] = [
        transformers.RepetitionPenaltyLogitsProcessor(1.2),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(40),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.02),
    ]
    expected = torch.tensor(logits_BV)
    for process in processors:
        expected = process(torch.tensor(prompt_BT), expected)
    ours = truncate(
        penalize_repetition(logits_BV, seen_BV, 1.2),
        GenerateConfig(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02),
    )
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5)


# Drawing ----------------------------------------------------------------------------------------------------------


def test_zero_temperature_is_greedy() -> None:
    keys_B = jax.vmap(jax.random.key)(jnp.arange(B))
    chosen_B = sample(random_logits(), keys_B, GenerateConfig(temperature=0), None)
    np.testing.assert_array_equal(chosen_B, random_logits().argmax(axis=1))


@given(st.lists(st.sampled_from([-np.inf, -3.0, -1e-30, -0.0, 0.0, 2.0, np.inf]), min_size=8, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_first_of_equal_logits_is_the_largest(values: list[float]) -> None:
    logits_1V = np.array([values], np.float32)
    assert jax.jit(largest)(logits_1V).tolist() == logits_1V.argmax(axis=1).tolist()


def test_draws_are_those_of_jax() -> None:
    keys_B, cfg = jax.vmap(jax.random.key)(jnp.arange(B)), GenerateConfig(temperature=0.7, top_k=30)
    expected_B = jax.vmap(jax.random.categorical)(keys_B, truncate(random_logits(), cfg))
    assert sample(random_logits(), keys_B, cfg, None).tolist() == expected_B.tolist()


@pytest.mark.parametrize("temperature", [1e-20, 1e-10])
def test_a_low_temperature_is_nearly_greedy(temperature: float) -> None:
    logits_BV = 1e4 * random_logits()
    keys_B = jax.vmap(jax.random.key)(jnp.arange(B))
    chosen_B = sample(logits_BV, keys_B, GenerateConfig(temperature=temperature), None)
    assert chosen_B.tolist() == logits_BV.argmax(axis=-1).tolist()


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """Chi-square over 20,000 draws; a wrong distribution of this shape would score in the hundreds."""
    draws, cfg = 20_000, GenerateConfig(temperature=0.8, top_k=12, top_p=0.95)
    logits_1V = random_logits(rows=1)
    keys_B = jax.vmap(jax.random.key)(jnp.arange(draws))
    chosen_B = jax.jit(lambda keys_B: sample(jnp.repeat(logits_1V, draws, axis=0), keys_B, cfg, None))(keys_B)
    counts_V = np.bincount(chosen_B, minlength=V)
    expected_V = draws * softmax(np.asarray(truncate(logits_1V, cfg)))[0]
    possible_V = expected_V > 0
    assert counts_V[~possible_V].sum() == 0
    degrees = possible_V.sum() - 1
    chi_square = np.sum((counts_V - expected_V)[possible_V] ** 2 / expected_V[possible_V])
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


def test_a_row_draws_with_its_own_key() -> None:
    keys_B, cfg = jax.vmap(jax.random.key)(jnp.arange(B)), GenerateConfig()
    together_B = sample(random_logits(), keys_B, cfg, None)
    alone = [int(sample(random_logits()[i : i + 1], keys_B[i : i + 1], cfg, None)[0]) for i in range(B)]
    assert together_B.tolist() == alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": 4}, "does not sample"),
        ({"beams": 4, "temperature": 0, "repetition_penalty": 1.1}, "no repetition_penalty; set repetition_penalty=1"),
        ({"beams": 4, "temperature": 0, "top_k": 3}, "no top_k; set top_k=None"),
        ({"beams": 4, "temperature": 0, "top_p": 0.9}, "no top_p; set top_p=1"),
        ({"beams": 4, "temperature": 0, "min_p": 0.1}, "no min_p; set min_p=0"),
        ({"beams": 4, "temperature": 0, "length_penalty": 1e3}, "length_penalty=1000.0 divides texts of tokens=200"),
        ({"temperature": 1e-40}, "1e-40 is below 1e-20"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty"),
        ({"repetition_penalty": 1e300}, "repetition_penalty"),
        ({"top_k": 2**31}, "top_k"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 2**31}, "tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**settings)
