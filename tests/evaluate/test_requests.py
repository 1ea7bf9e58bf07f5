"""Log-likelihoods by hand, in any batch, order and mesh; texts cut into requests; continuations up to stop strings."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from lmjax.data.tokenizers.alphabets import ByteTokenizer, CharacterTokenizer
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import ConfigError, DataError
from lmjax.evaluate import requests as module
from lmjax.evaluate.requests import (
    Likelihood,
    Request,
    Scorer,
    continuations,
    log_likelihoods,
    request,
    rolling,
    windows,
)
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate
from lmjax.generate.writer import Writer
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.weights import Params, initialize

pytestmark = pytest.mark.usefixtures("quick_compilation")

ALPHABET = "abcdefghijklmnopqrstuvwxyz .\n"
TOKENIZER = CharacterTokenizer(ALPHABET)
V, CONTEXT = TOKENIZER.vocab_size, 48
MODEL = decoder.build(
    ModelConfig(vocab=V, layers=2, embed=24, heads=4, mlp=40, embed_init_std=0.7, position="learned", context=CONTEXT)
)


@functools.cache
def params() -> Params:
    return initialize(MODEL.spec, jax.random.key(0))


def scorer(batch: int = 8, context: int = CONTEXT) -> Scorer:
    return Scorer(MODEL, params(), TOKENIZER, context, batch)


@functools.cache
def drawn(count: int = 23) -> tuple[Request, ...]:
    """Requests of many lengths, a few of them longer than the model reads."""
    rng = np.random.default_rng(0)
    return tuple(
        Request(rng.integers(V, size=rng.integers(1, 60)).tolist(), rng.integers(V, size=n).tolist(), 7 + n)
        for n in rng.integers(1, 12, size=count).tolist()
    )


_logits = jax.jit(MODEL.logits)


def by_hand(one: Request, context: int = CONTEXT) -> Likelihood:
    ids = [*one.context, *one.continuation]
    inputs, targets = ids[-context - 1 : -1], ids[1:][-context:]
    padded_BT = np.array([inputs + [0] * (CONTEXT - len(inputs))], np.int32)
    logits_TV = np.asarray(_logits(params(), padded_BT)[0, : len(inputs)], np.float64)
    logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
    n = len(one.continuation)
    picked = logp_TV[np.arange(len(targets)), targets][-n:]
    greedy = bool((logits_TV.argmax(axis=-1)[-n:] == targets[-n:]).all())
    return Likelihood(float(picked.sum()), greedy, n, one.bytes, max(0, len(ids) - 1 - context))


def close(found: Likelihood, expected: Likelihood, tolerance: float = 1e-5) -> bool:
    return found[1:] == expected[1:] and abs(found.logprob - expected.logprob) < tolerance


# Likelihoods ------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    found = log_likelihoods(scorer(), drawn())
    assert all(map(close, found, map(by_hand, drawn())))
    assert any(one.unread for one in found) and len({one.tokens for one in found}) > 5


def test_greedy_is_what_decoding_would_write() -> None:
    prompt = drawn()[0].context
    greedy = GenerateConfig(tokens=3, temperature=0, stop_at_endoftext=False)
    (written,) = generate(MODEL, params(), TOKENIZER, [prompt], greedy)
    first, *rest = written.ids
    other = Request(prompt, [(first + 1) % V, *rest], 3)
    found = log_likelihoods(scorer(), [Request(prompt, written.ids, 3), other])
    assert [one.greedy for one in found] == [True, False]


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_neither_batch_nor_order_matters(batch: int) -> None:
    expected = log_likelihoods(scorer(), drawn())
    assert all(map(close, log_likelihoods(scorer(batch), drawn()), expected))
    order = np.random.default_rng(1).permutation(len(drawn()))
    shuffled = log_likelihoods(scorer(batch), [drawn()[place] for place in order])
    assert all(map(close, shuffled, (expected[place] for place in order)))


def test_shapes_are_few() -> None:
    """Whatever the lengths, programs number at most two for each doubling of the length."""
    assert {module._bucket(length) for length in range(1, 1025)} == {
        16,
        24,
        32,
        48,
        64,
        96,
        128,
        192,
        256,
        384,
        512,
        768,
        1024,
    }
    assert all(length <= module._bucket(length) <= max(16, 1.5 * length) for length in range(1, 2000))
    log_likelihoods(scorer(), drawn())
    before = module._scores._cache_size()
    log_likelihoods(scorer(), [*drawn(), *drawn()[::2]])
    assert module._scores._cache_size() == before


def test_requests_that_differ_in_their_last_token_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices by a letter: the context is read once, and the numbers are those that each request has alone."""
    rng = np.random.default_rng(5)
    asked = []
    for length, before, ends in ((9, 0, V), (30, 0, 5), (CONTEXT + 7, 0, 4), (12, 3, 3), (20, 2, 1)):
        context, shared = (rng.integers(V, size=n).tolist() for n in (length, before))
        asked += [Request(context, [*shared, int(end)], 1) for end in rng.choice(V, ends, replace=False)]
    asked = [asked[place] for place in rng.permutation(len(asked))]
    alone = [by_hand(one) for one in asked]
    rows = 0
    real = module._batches

    def counted(scorer: Scorer, some: list[Request]) -> Iterator[Any]:
        nonlocal rows
        rows += len(some)
        return real(scorer, some)

    monkeypatch.setattr(module, "_batches", counted)
    found = log_likelihoods(scorer(4), asked)
    assert rows == 5 and len(asked) == V + 5 + 4 + 3 + 1
    assert all(close(one, other) for one, other in zip(found, alone, strict=True))
    assert any(one.greedy for one in found) and len({one.logprob for one in found}) == len(asked)


def test_what_does_not_fit_is_left_out_at_its_start() -> None:
    long = Request(list(range(20)) * 4, [3, 1, 4], 3)
    (found,) = log_likelihoods(scorer(), [long])
    (kept,) = log_likelihoods(scorer(), [long._replace(context=long.context[-(CONTEXT + 1 - 3) :])])
    assert found.unread == 80 + 3 - 1 - CONTEXT and kept.unread == 0
    assert found.logprob == pytest.approx(kept.logprob, abs=1e-6)


def test_no_requests() -> None:
    assert log_likelihoods(scorer(), []) == []


def test_a_continuation_longer_than_what_is_read_is_scored_by_windows() -> None:
    rng = np.random.default_rng(2)
    ids = rng.integers(V, size=200).tolist()
    for cut in (1, 30, 70):  # little context, some, and more than is read
        (found,) = log_likelihoods(scorer(), [Request(ids[:cut], ids[cut:], 9)])
        parts, start = [], cut
        for end in [*range(max(CONTEXT + 1, cut + CONTEXT // 2), 200, CONTEXT // 2), 200]:
            parts.append(by_hand(Request(ids[:start], ids[start:end], 0)))
            start = end
        assert found.logprob == pytest.approx(sum(part.logprob for part in parts), abs=1e-4)
        assert (found.tokens, found.bytes) == (200 - cut, 9) and len(parts) > 5
        assert found.unread == max(0, cut + CONTEXT // 2 - 1 - CONTEXT)


def test_an_unknown_id() -> None:
    with pytest.raises(DataError, match=f"token {V}, and the model's table only {V} rows"):
        log_likelihoods(scorer(), [Request([1], [V], 1)])


def test_batches_can_be_left_off() -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        log_likelihoods(scorer()._replace(on_batch=stop), drawn())


# Texts to requests ------------------------------------------------------------------------------------------------


PAIRS = {b"th": 257, b" t": 258}


class PairTokenizer(ByteTokenizer):
    """Bytes, of which `th` and ` t` are one token where they stand: merges that may cross a cut."""

    vocab_size = 259

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for byte in text.encode():
            pair = bytes([ids[-1], byte]) if ids and ids[-1] < 256 else b""
            ids[-1 if pair in PAIRS else len(ids) :] = [PAIRS.get(pair, byte)]
        return ids


class BeginTokenizer(ByteTokenizer):
    begin_id = 256


def test_a_request_is_cut_at_the_context() -> None:
    assert request(TOKENIZER, "ab", " cd") == Request(TOKENIZER.encode("ab"), TOKENIZER.encode(" cd"), 3)
    assert request(ByteTokenizer(), "", "é") == Request([256], list("é".encode()), 2)
    assert request(BeginTokenizer(), "a", "b").context == [256, ord("a")]


def test_spaces_at_the_cut_belong_to_the_continuation() -> None:
    one = request(PairTokenizer(), "see ", "the")  # not `the` after a space, which no text has
    assert one == Request(list(b"see"), [258, ord("h"), ord("e")], 3)


def test_a_token_across_the_cut_begins_the_continuation() -> None:
    one = request(PairTokenizer(), "wit", "h")
    assert one == Request(list(b"wi"), [257], 1)
    whole: Tokenizer = PairTokenizer()
    for context, continuation in [("wit", "h"), ("t", "h"), ("a t", "hth"), ("", "th"), ("x", "y")]:
        one = request(whole, context, continuation)
        assert [i for i in one.context if i != 256] + list(one.continuation) == whole.encode(context + continuation)


def test_a_continuation_without_text() -> None:
    with pytest.raises(DataError, match="has no tokens"):
        request(TOKENIZER, "abc", "")


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(5, 8, 8), (8, 8, 8), (9, 8, 8), (40, 8, 8), (40, 8, 3), (17, 8, 1)]
)
def test_windows_score_every_token_once(length: int, context: int, stride: int) -> None:
    text = ALPHABET[:length] + "a" * (length - len(ALPHABET))
    cut = windows(TOKENIZER, text, context=context, stride=stride)
    assert [i for one in cut for i in one.continuation] == TOKENIZER.encode(text)
    assert sum(one.bytes for one in cut) == length
    ids, end = [TOKENIZER.endoftext_id, *TOKENIZER.encode(text)], 1
    for one in cut:
        assert list(one.context) == ids[end - len(one.context) : end]  # what stands right before
        assert len(one.context) + len(one.continuation) - 1 <= context
        assert len(one.continuation) <= (context if one is cut[0] else stride)
        end += len(one.continuation)
    assert all(len(one.context) + len(one.continuation) - 1 == context for one in cut[1:])  # as much as can be read


def test_rolling_is_the_sum_over_windows_by_hand() -> None:
    texts = ["the quick brown fox jumps over the lazy dog. " * 3, "short", "a b c"]
    for found, text in zip(rolling(scorer(context=16), texts, stride=5), texts, strict=True):
        parts = [by_hand(one, 16) for one in windows(TOKENIZER, text, context=16, stride=5)]
        assert found.logprob == pytest.approx(sum(part.logprob for part in parts), abs=1e-4)
        assert (found.tokens, found.bytes) == (len(text), len(text))


def test_an_empty_text_has_nothing_to_roll_over() -> None:
    with pytest.raises(DataError, match="empty text"):
        rolling(scorer(), ["abc", ""], stride=8)


# Continuations ----------------------------------------------------------------------------------------------------

PROMPTS = ["the ", "", "a b c d", "quick", "zz", "over the lazy dog"]
GREEDY = GenerateConfig(tokens=21, temperature=0.0)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, seed=3)


def test_greedy_continuations_are_those_of_generate() -> None:
    expected = [generate(MODEL, params(), TOKENIZER, [prompt], GREEDY)[0].text for prompt in PROMPTS]
    assert continuations(scorer(4), PROMPTS, GREEDY) == expected


def test_they_end_before_the_first_stop_string() -> None:
    whole = continuations(scorer(4), PROMPTS, SAMPLED)
    stop = ["e", whole[0][2:4]]
    cut = continuations(scorer(4), PROMPTS, SAMPLED, stop=stop)
    assert all(
        text.startswith(kept) and not any(mark in kept for mark in stop) for text, kept in zip(whole, cut, strict=True)
    )
    for text, kept in zip(whole, cut, strict=True):
        assert kept == text or any(text[len(kept) :].startswith(mark) for mark in stop)
    assert cut != whole


def test_sampling_depends_on_the_numbers_alone() -> None:
    numbers = [7, 3, 2**31 - 1, 0, 11, 5]
    expected = continuations(scorer(8), PROMPTS, SAMPLED, numbers=numbers)
    assert len(set(expected)) == len(PROMPTS)
    assert continuations(scorer(4), PROMPTS, SAMPLED, numbers=numbers) == expected
    assert continuations(scorer(4), PROMPTS[::-1], SAMPLED, numbers=numbers[::-1]) == expected[::-1]
    assert continuations(scorer(4), PROMPTS, SAMPLED) != expected


def test_decoding_ends_when_every_row_has_come_to_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = 0
    real = Writer.write

    def counted(writer: Writer, steps: int) -> list[tuple[int, list[int]]]:
        nonlocal pieces
        pieces += 1
        return real(writer, steps)

    monkeypatch.setattr(Writer, "write", counted)
    assert continuations(scorer(4), PROMPTS[:3], GREEDY, stop=list(ALPHABET)) == [""] * 3
    assert pieces == 1


def test_a_prompt_without_room() -> None:
    with pytest.raises(ConfigError, match="leave no room"):
        continuations(scorer(), ["abc"], dataclasses.replace(GREEDY, tokens=CONTEXT))
    tight = dataclasses.replace(GREEDY, tokens=CONTEXT - 4)
    assert continuations(scorer(4), ["abcdefgh"], tight) == continuations(scorer(4), ["efgh"], tight)


# On a mesh --------------------------------------------------------------------------------------------------------

MESH_PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import json, jax
from lmjax.devices.config import MeshConfig
from lmjax.devices.mesh import make_mesh, shardings
import test_requests as t
mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2))
with jax.set_mesh(mesh):
    params = jax.device_put(t.params(), shardings(t.MODEL.spec, mesh))
spread = t.scorer(3)._replace(params=params, mesh=mesh)
found = t.log_likelihoods(spread, t.drawn())
print(json.dumps([found, t.continuations(spread._replace(batch=6), t.PROMPTS, t.SAMPLED)]))
"""


def test_on_a_mesh() -> None:
    """Weights, rows and tokens of a row are spread over devices; the batch is not a multiple of theirs."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    program = MESH_PROGRAM.format(folder=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, texts = json.loads(done.stdout)
    scored = [Likelihood(*one) for one in found]
    assert all(close(one, other, 5e-5) for one, other in zip(scored, log_likelihoods(scorer(), drawn()), strict=True))
    assert texts == continuations(scorer(6), PROMPTS, SAMPLED)
