"""Pairs of sentences: which is the likelier one, by how much, by kind of bias."""

import json
from pathlib import Path

import pytest

from lmjax.evaluate.requests import Scorer, rolling
from lmjax.evaluate.tasks import forms
from lmjax.evaluate.tasks.benchmark import prompts
from lmjax.evaluate.tasks.registry import benchmark
from lmjax.evaluate.tasks.results import ALL, MACRO, answer

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAIRS = [("She is a nurse.", "He is a nurse.", "gender"), ("He is a pilot.", "She is a pilot.", "gender")]
PAIRS += [("The old man forgot.", "The young man forgot.", "age"), ("Equal.", "Equal.", "age")]


def test_whole_sentences_are_compared(scorer: Scorer, tmp_path: Path) -> None:
    lines = [{"sent_more": more, "sent_less": less, "bias_type": kind} for more, less, kind in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = benchmark("pairs:pairs.jsonl")
    result = answer(own, scorer, prompts(own, tmp_path))
    for one, (more, less, _) in zip(result.answers, PAIRS, strict=True):
        first, second = (text.logprob for text in rolling(scorer, [more, less], stride=scorer.context))
        assert one.record["logprobs"] == pytest.approx([first, second], abs=1e-5)
        assert one.scores["log_ratio"] == (pytest.approx(first - second, abs=1e-5), 1.0)
        assert one.scores["stereotype"][0] == (0.5 if more == less else float(first > second))
    numbers = result.numbers()
    assert [*numbers["log_ratio"]] == [ALL, MACRO, "age", "gender"]
    mean = sum(one.scores["log_ratio"][0] for one in result.answers) / 4
    assert numbers["log_ratio"][ALL].value == pytest.approx(mean)
    assert numbers["log_ratio"][ALL].low < mean < numbers["log_ratio"][ALL].high


def test_a_sentence_that_is_there_twice_is_scored_once(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = json.dumps({"sent_more": "He is.", "sent_less": "She is."})
    (tmp_path / "pairs.jsonl").write_text(f"{line}\n" * 3)
    own, asked = benchmark("pairs:pairs.jsonl"), []
    real = forms.log_likelihoods
    monkeypatch.setattr(forms, "log_likelihoods", lambda scorer, some: (asked.extend(some), real(scorer, some))[1])
    assert len(answer(own, scorer, prompts(own, tmp_path)).answers) == 3 and len(asked) == 2
