"""Each form by hand: which choice wins by which measure, what a cloze, a text and a vote are worth."""

import math

import numpy as np
import pytest

from lmjax.evaluate import requests
from lmjax.evaluate.requests import Likelihood, Scorer, continuations, log_likelihoods, request
from lmjax.evaluate.tasks import forms
from lmjax.evaluate.tasks.forms import Cloze, Generation, MultipleChoice, Rolling
from lmjax.evaluate.tasks.prompt import Item, Prompt
from lmjax.generate.config import GenerateConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")


def prompt(context: str, choices: tuple[str, ...], gold: int = 0, number: int = 0) -> Prompt:
    return Prompt(number, Item(context, choices, gold), context, " ")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    """Log-probabilities to put into a model's mouth, by (context, continuation); tokens are bytes, and `th` is one."""
    said: dict[tuple[str, str], float] = {}

    def answer(scorer: Scorer, asked: list[tuple[str, str]]) -> list[Likelihood]:
        return [Likelihood(said[pair], False, len(pair[1].replace("th", "t")), len(pair[1].encode())) for pair in asked]

    monkeypatch.setattr(forms, "request", lambda tokenizer, context, continuation: (context, continuation))
    monkeypatch.setattr(forms, "log_likelihoods", answer)
    return said


def test_measures_choose_differently(scorer: Scorer, told: dict[tuple[str, str], float]) -> None:
    told |= {("Q", " a"): -4.0, ("Q", " ththth"): -6.0, ("Q", " bbbbbbbb"): -9.5}
    told |= {("A:", " a"): -1.0, ("A:", " ththth"): -3.5, ("A:", " bbbbbbbb"): -7.5}
    (found,) = MultipleChoice(unconditional="A:").answers(scorer, [prompt("Q", ("a", "ththth", "bbbbbbbb"), gold=2)])
    # sums -4 -6 -9.5; by tokens (with the space) -2 -1.5 -1.06; by bytes -4 -1 -1.19; less the unconditional -3 -2.5 -2
    assert found.record["chosen"] == {"acc": 0, "acc_token": 2, "acc_byte": 1, "acc_uncond": 2}
    rights = {"acc": 0.0, "acc_token": 1.0, "acc_byte": 0.0, "acc_uncond": 1.0}
    assert {name: value for name, (value, _) in found.scores.items() if name in rights} == rights
    assert found.scores["gold_bpb"] == (pytest.approx(9.5 / math.log(2)), 9.0)
    assert found.record["logprobs"] == [-4.0, -6.0, -9.5] and found.record["gold"] == 2


def test_bytes_are_of_utf8(scorer: Scorer, told: dict[tuple[str, str], float]) -> None:
    told |= {("Q", " éé"): -4.0, ("Q", " aaa"): -3.5}
    (found,) = MultipleChoice().answers(scorer, [prompt("Q", ("éé", "aaa"))])
    assert found.record["chosen"] == {"acc": 1, "acc_token": 1, "acc_byte": 0}
    assert "acc_uncond" not in found.scores


def test_what_is_asked_twice_is_scored_once(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = requests.log_likelihoods
    monkeypatch.setattr(forms, "log_likelihoods", lambda scorer, some: (asked.extend(some), real(scorer, some))[1])
    questions = [prompt(f"question {n}", ("yes", "no"), n % 2, n) for n in range(4)]
    found = MultipleChoice(unconditional="Answer:").answers(scorer, questions)
    assert len(asked) == 4 * 2 + 2
    assert [one.record["gold"] for one in found] == [0, 1, 0, 1]


def test_choices_of_a_model(scorer: Scorer) -> None:
    questions = [prompt(f"question {n}", ("yes", "no", "perhaps"), n % 3, n) for n in range(5)]
    for one, found in zip(questions, MultipleChoice().answers(scorer, questions), strict=True):
        given = log_likelihoods(scorer, [request(scorer.tokenizer, one.context, text) for text in one.continuations])
        assert found.record["logprobs"] == pytest.approx([x.logprob for x in given], abs=1e-5)
        assert found.record["chosen"]["acc"] == int(np.argmax([x.logprob for x in given]))
        assert found.unread == 0


def test_what_was_not_read_is_counted(scorer: Scorer) -> None:
    long = prompt("x" * 200, ("yes", "maybe"))
    (found,) = MultipleChoice().answers(scorer, [long])
    assert found.unread == 200 + len(" maybe") - 1 - scorer.context


def test_pairs_of_sentences(scorer: Scorer) -> None:
    """Without a context and a delimiter, choices are whole texts, and the likelier one is chosen."""
    pairs = [(f"She is a {word}.", f"He is a {word}.") for word in ("nurse", "pilot", "judge", "cook")]
    found = MultipleChoice().answers(scorer, [Prompt(n, Item("", pair), "", "") for n, pair in enumerate(pairs)])
    for one, pair in zip(found, pairs, strict=True):
        whole = [text.logprob for text in requests.rolling(scorer, pair, stride=scorer.context)]
        assert one.record["logprobs"] == pytest.approx(whole, abs=1e-5)
        assert one.scores["acc"][0] == float(whole[0] > whole[1])


def test_cloze(scorer: Scorer) -> None:
    (written,) = continuations(scorer, ["abc"], GenerateConfig(tokens=3, temperature=0, stop_at_endoftext=False))
    assert len(written.encode()) == 3, "the model writes text, for this seed"
    wrong = written[:-1] + chr(ord(written[-1]) ^ 1)
    asked = [Prompt(n, Item("abc", (text,)), "abc", "") for n, text in enumerate((written, wrong))]
    right, other = Cloze().answers(scorer, asked)
    assert right.scores["acc"] == (1.0, 1.0) and other.scores["acc"] == (0.0, 1.0)
    (expected,) = log_likelihoods(scorer, [request(scorer.tokenizer, "abc", wrong)])
    assert other.scores["nll"] == (pytest.approx(-expected.logprob), 1.0)
    assert other.scores["bpb"] == (pytest.approx(-expected.logprob / math.log(2)), 3.0)


def test_rolling(scorer: Scorer) -> None:
    texts = ["One day, " * 30, "short"]
    found = Rolling(share=0.25).answers(scorer, [Prompt(n, Item(text), text, " ") for n, text in enumerate(texts)])
    expected = requests.rolling(scorer, texts, stride=24)
    for one, whole, text in zip(found, expected, texts, strict=True):
        assert one.scores["nll"] == (pytest.approx(-whole.logprob), len(text))
        assert one.scores["bpb"] == (pytest.approx(-whole.logprob / math.log(2)), len(text))
        assert one.record["stride"] == 24


def test_a_vote(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most frequent answer counts, though most answers are others; draws are numbered by question and sample."""
    said = {"a": [" 7", "8 ", "7", "9", "6"], "b": ["1", "2", "2", "1", "3"], "c": ["5", "5", "5", "4", "4"]}
    named = []

    def write(scorer, asked, cfg, *, stop, numbers):
        named.extend(numbers)
        assert stop == ("\n",) and cfg.tokens == 9 and cfg.temperature == 0.5
        return [said[context][number % 5] for context, number in zip(asked, numbers, strict=True)]

    monkeypatch.setattr(forms, "continuations", write)
    form = Generation(tokens=9, stop=("\n",), samples=5, temperature=0.5)
    asked = [prompt("a", ("7",), number=4), prompt("b", ("2",), number=0), prompt("c", (" 4",), number=9)]
    found = form.answers(scorer, asked)
    assert named == [*range(20, 25), *range(5), *range(45, 50)]
    assert [one.scores["exact_match"][0] for one in found] == [0.4, 0.4, 0.4]
    assert [one.scores["majority"][0] for one in found] == [1.0, 0.0, 0.0]  # of "1" and "2" the first that was written
    assert found[0].record == {"texts": said["a"], "answer": "7"}


def test_generation_is_what_the_model_writes(scorer: Scorer) -> None:
    (written,) = continuations(scorer, ["abc"], GenerateConfig(tokens=6, temperature=0))
    asked = [prompt("abc", (written,)), prompt("abc", ("zzz",), number=1)]
    right, wrong = Generation(tokens=6, stop=("\0never",)).answers(scorer, asked)
    assert right.scores == {"exact_match": (1.0, 1.0)} and wrong.scores == {"exact_match": (0.0, 1.0)}
