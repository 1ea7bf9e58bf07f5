"""Beam search against exhaustive search, greedy search and its own definition of a score."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.generate.beam import beam_search
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate_ids
from lmjax.generate.forward import functions
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.weights import Params, Weight, map_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

V, END, NEW = 4, 3, 4
PROMPTS_BT = np.array([[0, 1, 2], [2, 0, 0]], np.int32)
LENGTHS_B = np.array([3, 1], np.int32)


MODEL = decoder.build(ModelConfig(vocab=V, layers=2, pattern=("local", "global"), window=2, embed=16, heads=2, mlp=24))


@functools.cache
def random_params(seed: int) -> Params:
    rng = np.random.default_rng(seed)

    def draw(weight: Weight) -> jax.Array:
        return jnp.asarray(0.8 * weight.unstacked().fan_in ** -0.5 * rng.standard_normal(weight.shape), jnp.float32)

    return map_weights(draw, MODEL.spec)


def config(beams: int, length_penalty: float, tokens: int = NEW) -> GenerateConfig:
    return GenerateConfig(tokens=tokens, temperature=0, beams=beams, length_penalty=length_penalty)


def search(seed: int, cfg: GenerateConfig, ends: tuple[int, ...] = (END,)) -> tuple[np.ndarray, np.ndarray]:
    params = MODEL.unstack(random_params(seed))
    ids_BZ, score_B = beam_search(functions(MODEL, V), params, PROMPTS_BT, LENGTHS_B, np.array(ends), cfg=cfg)
    return np.asarray(ids_BZ), np.asarray(score_B)


@jax.jit
def whole_logprobs(params: Params, tokens_BT: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(MODEL.logits(params, tokens_BT))


def scores(seed: int, prompt: list[int], texts: list[tuple[int, ...]], length_penalty: float) -> np.ndarray:
    """By one pass over every whole text; each counts up to and with its first END."""
    inputs = np.array([[*prompt, *text] for text in texts], np.int32)
    logp_BTV = np.asarray(whole_logprobs(random_params(seed), inputs))[:, len(prompt) - 1 : -1]
    chosen_BO = np.take_along_axis(logp_BTV, inputs[:, len(prompt) :, None], axis=2)[..., 0]
    lengths = np.array([text.index(END) + 1 if END in text else len(text) for text in texts])
    sums = np.where(np.arange(chosen_BO.shape[1]) < lengths[:, None], chosen_BO, 0).sum(axis=1)
    return sums / ((5 + lengths) / 6) ** length_penalty


def every_text() -> list[tuple[int, ...]]:
    """All texts of NEW tokens; what follows an END is filled with END."""
    texts = itertools.product(range(V), repeat=NEW)
    return [text for text in texts if END not in text or set(text[text.index(END) :]) == {END}]


@pytest.mark.parametrize("length_penalty", [0.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_best_text(seed: int, length_penalty: float) -> None:
    ids_BZ, score_B = search(seed, config(V**NEW, length_penalty))
    for prompt, length, ids, score in zip(PROMPTS_BT, LENGTHS_B, ids_BZ, score_B, strict=True):
        texts = every_text()
        expected = scores(seed, prompt[:length].tolist(), texts, length_penalty)
        assert tuple(ids) == texts[int(expected.argmax())]
        assert score == pytest.approx(expected.max(), abs=1e-5)


def test_a_text_may_end_in_several_ways() -> None:
    """The best text that ends with either of two tokens, whose places in the vocabulary are then exchanged."""
    other = (END + 1) % V
    for ends in ((END, other), (other, END)):
        ids_BZ, score_B = search(0, config(V**NEW, 0.0), ends)
        for prompt, length, ids, score in zip(PROMPTS_BT, LENGTHS_B, ids_BZ, score_B, strict=True):
            logp = {text: ended_logp(prompt[:length].tolist(), text, ends) for text in texts_until(ends)}
            best = max(logp, key=lambda text: logp[text])
            assert tuple(ids[: len(best)]) == best and set(ids[len(best) :]) <= {ends[0]}
            assert score == pytest.approx(logp[best], abs=1e-5)


def texts_until(ends: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All texts of NEW tokens, or fewer that end with one of `ends`, and hold none before."""
    texts = itertools.chain.from_iterable(itertools.product(range(V), repeat=n) for n in range(1, NEW + 1))
    return [text for text in texts if not set(text[:-1]) & {*ends} and (len(text) == NEW or text[-1] in ends)]


def ended_logp(prompt: list[int], text: tuple[int, ...], ends: tuple[int, ...]) -> float:
    padded = [*prompt, *text, *[0] * (NEW - len(text))]
    logp_TV = np.asarray(whole_logprobs(random_params(0), np.array([padded])))[0, len(prompt) - 1 :]
    return float(sum(logp_TV[place, token] for place, token in enumerate(text)))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_score_is_that_of_the_text(seed: int, beams: int) -> None:
    ids_BZ, score_B = search(seed, config(beams, 0.6))
    for prompt, length, ids, score in zip(PROMPTS_BT, LENGTHS_B, ids_BZ, score_B, strict=True):
        assert score == pytest.approx(scores(seed, prompt[:length].tolist(), [tuple(ids)], 0.6)[0], abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_one_beam_is_greedy(seed: int) -> None:
    prompts = [prompt[:length].tolist() for prompt, length in zip(PROMPTS_BT, LENGTHS_B, strict=True)]
    greedy = generate_ids(MODEL, random_params(seed), prompts, config(1, 0.0, tokens=9), endoftext=END, vocab=V)
    found = search(seed, config(1, 0.0, tokens=9))[0].tolist()
    assert greedy == [ids[: len(one)] for ids, one in zip(found, greedy, strict=True)]
    assert all(len(ids) == 9 or ids[-1] == END for ids in greedy)


@pytest.mark.parametrize("seed", range(4))
def test_more_beams_find_no_less_than_greedy(seed: int) -> None:
    """No theorem, but beam search that often finds less is broken."""
    greedy_B, wide_B = search(seed, config(1, 0.0, tokens=9))[1], search(seed, config(8, 0.0, tokens=9))[1]
    assert np.all(wide_B >= greedy_B - 1e-6)


def test_length_penalty_favours_longer_texts() -> None:
    lengths = []
    for length_penalty in (0.0, 3.0):
        ids = np.concatenate([search(seed, config(6, length_penalty, tokens=9))[0] for seed in range(4)])
        lengths.append(np.mean(np.sum(ids != END, axis=1)))
    assert lengths[0] < lengths[1]


def test_without_a_stop_token_every_text_is_full() -> None:
    cfg = dataclasses.replace(config(3, 0.6), stop_at_endoftext=False)
    rows = generate_ids(MODEL, random_params(0), [[0, 1, 2], [2]], cfg, endoftext=END, vocab=V)
    assert [len(row) for row in rows] == [NEW, NEW]
