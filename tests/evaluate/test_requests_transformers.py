"""Log-likelihoods of continuations are those that transformers computes, request by request."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax.data.tokenizers.alphabets import CharacterTokenizer
from lmjax.evaluate.requests import Likelihood, Request, Scorer, log_likelihoods, request, rolling, windows
from lmjax.hf.imported import read_checkpoint
from lmjax.models import decoder
from lmjax.run.trained import load_trained
from tests.conftest import STORIES
from tests.hf.test_families import CASES, V, random_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # nats per request

CONTINUATIONS = {
    "Once upon a time, there was a": [" little girl", " dragon who liked to", "n old man."],
    "Lily and Ben went to the park. They saw a big": [" dog.", " slide. It was very high and they", " q"],
    "The cat sat on the ": ["mat", "roof of the house."],
    "": ["One day, Tom", "Lily"],
}


def theirs(model: Any, one: Request) -> Likelihood:
    """As transformers says it, alone in its batch and in float64 after the logits."""
    ids = torch.tensor([[*one.context, *one.continuation]])
    with torch.no_grad():
        logits_TV = model(ids[:, :-1], use_cache=False).logits[0, -len(one.continuation) :].double()
    targets = ids[0, -len(one.continuation) :]
    logprob = torch.log_softmax(logits_TV, dim=-1).gather(1, targets[:, None]).sum().item()
    greedy = bool((logits_TV.argmax(dim=-1) == targets).all())
    return Likelihood(logprob, greedy, len(one.continuation), one.bytes)


def check(found: Sequence[Likelihood], expected: Sequence[Likelihood]) -> None:
    for ours, other in zip(found, expected, strict=True):
        assert ours[1:] == other[1:]
        assert abs(ours.logprob - other.logprob) < TOLERANCE


def test_stories260k(stories: Path, exported_stories: Path) -> None:
    """Text and ids: the tokenizers, too, agree on where a continuation begins."""
    trained = load_trained(stories)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported_stories)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported_stories)
    scorer = Scorer(trained.scorer, trained.params, trained.tokenizer, context=512, batch=4)
    asked = [request(trained.tokenizer, context, end) for context, ends in CONTINUATIONS.items() for end in ends]
    texts = [context + end for context, ends in CONTINUATIONS.items() for end in ends]
    assert [[*one.context, *one.continuation] for one in asked] == [tokenizer(text)["input_ids"] for text in texts]
    greedy = np.load(STORIES / "reference_logits.npz")["greedy_ids"].tolist()
    asked += [Request(greedy[:cut], greedy[cut : cut + 20], 0) for cut in (1, 30, 100)]
    found = log_likelihoods(scorer, asked)
    check(found, [theirs(model, one) for one in asked])
    assert [one.greedy for one in found[-3:]] == [True] * 3
    story = trained.tokenizer.decode(greedy[1:])
    small = scorer._replace(context=64)
    (whole,) = rolling(small, [story], stride=32)
    parts = [theirs(model, one) for one in windows(trained.tokenizer, story, context=64, stride=32)]
    assert len(parts) > 3 and abs(whole.logprob - sum(part.logprob for part in parts)) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_random_models(name: str, tmp_path: Path) -> None:
    model = random_model(*CASES[name])
    model.save_pretrained(tmp_path)
    ours = read_checkpoint(tmp_path)
    rng = np.random.default_rng(0)
    sizes = itertools.product((1, 9, 40), (1, 6))
    asked = [Request(rng.integers(V, size=m).tolist(), rng.integers(V, size=n).tolist(), n) for m, n in sizes]
    alphabet = [chr(ord("A") + i) for i in range(V - 1)]
    scorer = Scorer(decoder.build(ours.model), ours.params, CharacterTokenizer(alphabet), context=128, batch=4)
    check(log_likelihoods(scorer, asked), [theirs(model, one) for one in asked])
