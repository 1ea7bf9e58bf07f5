"""A classifier tells apart what it was shown, its bits are those of its texts, and its file is that or refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmjax.__main__ import parse
from lmjax.data.curate.classifier import Classifier, Learning, load_classifier, save_classifier, score
from lmjax.data.curate.document import Changed, Document, Dropped
from lmjax.data.curate.hashing import words
from lmjax.data.curate.labelled import Labelled
from lmjax.data.curate.recipe import STEPS
from lmjax.data.curate.toxicity import Toxicity
from lmjax.errors import ConfigError, DataError
from lmjax.schema import validated
from tests.data.curate.conftest import text_of

INSULT = "You are a complete idiot and nobody likes you"


@pytest.fixture
def labelled(tmp_path: Path, sentences: Callable[[int, int], str]) -> str:
    """A file of 120 texts, a third of them with an insult."""
    lines = []
    for n in range(120):
        text = sentences(1, n).rstrip(".")
        lines.append({"text": f"{text} {INSULT}" if n % 3 == 0 else f"{text} and so it goes", "label": n % 3 == 0})
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_it_learns_and_says_how_well(labelled: str, sentences: Callable[[int, int], str]) -> None:
    cfg = Labelled(labelled=(labelled,), buckets=1 << 12)
    classifier, facts = cfg.learn([*cfg.examples()])
    assert facts["texts"] + facts["held_out"] == 120 and facts["held_out"] > 3
    assert facts["accuracy"] == facts["area_under_curve"] == 1.0
    insulting, kind = classifier.score([f"{sentences(1, 500)} {INSULT}.", f"{sentences(1, 501)} and so it goes"])
    assert insulting > 0.8 and kind < 0.2
    assert np.array_equal(cfg.learn([*cfg.examples()])[0].weights, classifier.weights)


def test_the_gradient_is_that_of_the_logistic_loss() -> None:
    """One step on one text of each kind, written out: w += rate * (y - p) * x."""
    learning = Learning(buckets=256, epochs=1, rate=0.5)
    texts = [("good words here", True), ("bad words there", False)] * 20
    examples = [
        learning.example(words(text), kind, str(n))._replace(held_out=False) for n, (text, kind) in enumerate(texts)
    ]
    expected = np.zeros(257)
    order = np.random.default_rng([0, 2]).permutation(40)
    for step, index in enumerate(order):
        (places, values), kind, _ = examples[index]
        x = np.zeros(257)
        x[places], x[-1] = values, 0.1
        expected += 0.5 * (1 - step / 40) * (kind - 1 / (1 + np.exp(-expected @ x))) * x
    np.testing.assert_allclose(learning.learn(examples)[0].weights, expected, atol=1e-12)


def test_the_area_under_the_curve_counts_pairs(sentences: Callable[[int, int], str]) -> None:
    """Where kinds cannot be told apart it is a half, or near it."""
    learning = Learning(buckets=1 << 10)
    examples = [learning.example(words(sentences(1, n)), n % 2 == 0, str(n)) for n in range(400)]
    assert 0.2 < learning.learn(examples)[1]["area_under_curve"] < 0.8


def test_a_file_gives_the_same_scores_or_is_refused(tmp_path: Path) -> None:
    classifier = Classifier(np.random.default_rng(0).normal(size=(1 << 10) + 1))
    path = tmp_path / "a.classifier"
    save_classifier(classifier, path)
    texts = ["some words", "", "others again"]
    assert np.array_equal(score(texts, path), classifier.score(texts))
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[:-1] + b"x", b"{}\n" + whole, b"", whole.replace(b"1024", b"1023", 1)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="is no classifier, or damaged"):
            load_classifier(path)
    path.write_bytes(whole.replace(b'"format": 1', b'"format": 9', 1))
    with pytest.raises(DataError, match="in format 9"):
        load_classifier(path)
    with pytest.raises(DataError, match="there is no classifier"):
        load_classifier(tmp_path / "b.classifier")


@pytest.mark.parametrize(
    "line", ['{"text": "a"}', '{"text": "a", "label": 2}', '{"label": 1}', "[1]", '{"text": "a", "label": "x"}']
)
def test_what_has_no_label_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "labelled.jsonl"
    path.write_text('{"text": "b", "label": 0}\n' + line + "\n")
    (tmp_path / "other.jsonl").write_text('{"text": "b", "label": 0}\n' * 3)
    with pytest.raises(
        DataError, match=r"labelled\.jsonl, item 2: it needs a text under 'text' and under 'label' true"
    ):
        list(Labelled(labelled=(f"{tmp_path}/other.jsonl", str(path))).examples())
    path.write_text('{"text": "b", "label": 0}\n')
    with pytest.raises(DataError, match="too few to learn from: at least 20 of each"):
        Toxicity(labelled=(str(path),)).fit()


# The step -------------------------------------------------------------------------------------------------------------


def test_toxic_sentences_are_masked_and_nothing_else(labelled: str, sentences: Callable[[int, int], str]) -> None:
    step = Toxicity(labelled=(labelled,), buckets=1 << 12, most=0.7, action="mask")
    treat = step.start(step.fit().arrays)
    kind = "And so it goes on, 3.14 and all;\n\n  and so it goes! And so it goes…"
    assert text_of(treat(Document(kind, "s/1", "s"))) == kind
    for before, after in ((" ", "."), ("\n", ".\r\n"), ("", "?! ")):
        toxic = f"{kind}.{before or ' '}{INSULT}{after}\t{kind}"
        outcome = treat(Document(toxic, "s/1", "s"))
        assert isinstance(outcome, Changed) and outcome.what == ("a toxic sentence",)
        rest = after.lstrip("?!.")
        assert outcome.document.text == f"{kind}.{before or ' '}<toxic>{rest}\t{kind}"
    broken = INSULT.replace("idiot and", "idiot\nand")
    assert text_of(treat(Document(f"{kind}\n \n{broken}\n\n{kind}", "s/1", "s"))) == f"{kind}\n \n<toxic>\n\n{kind}"
    assert text_of(treat(Document("You idiot. Complete idiot!", "s/1", "s"))) == "You idiot. Complete idiot!"


def test_documents_with_enough_toxic_sentences_are_dropped(labelled: str) -> None:
    for least, dropped in ((1, True), (2, True), (3, False)):
        step = Toxicity(labelled=(labelled,), buckets=1 << 12, most=0.7, least=least)
        outcome = step.start(step.fit().arrays)(Document(f"{INSULT}. And so it goes. {INSULT}!", "s/1", "s"))
        assert isinstance(outcome, Dropped) is dropped and outcome.found == ("probability 0.9",)  # type: ignore[union-attr]


def test_the_command_makes_what_the_step_takes(
    labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "toxic.classifier")
    arguments = parse(["classifier", labelled, f"--out={out}"])
    assert arguments.function(arguments) == 0
    assert "accuracy 1.0, area under curve 1.0" in capsys.readouterr().out
    given, learned = Toxicity(classifier=out), Toxicity(labelled=(labelled,))
    assert np.array_equal(given.fit().arrays["weights"], learned.fit().arrays["weights"])
    assert given.inputs() == (out,)
    with pytest.raises(ConfigError, match=r"does not end in \.classifier"):
        parse(["classifier", labelled, "--out=toxic.bin"])
    for wrong in ({}, {"labelled": (labelled,), "classifier": out}):
        with pytest.raises(ConfigError, match="either labelled texts to learn from or a classifier"):
            validated(STEPS["toxicity"], wrong)
