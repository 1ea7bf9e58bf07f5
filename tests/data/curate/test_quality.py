"""The classifier tells apart what it was shown; its weights do not depend on when or where it learns."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmjax.data.curate.document import Changed, Document, Dropped
from lmjax.data.curate.quality import Quality
from lmjax.errors import DataError


@pytest.fixture
def step(tmp_path: Path, sentences: Callable[[int, int], str]) -> Quality:
    """Good texts and bad ones, of the same words but for a few."""
    for kind, extra in (("good", "The committee therefore concludes."), ("bad", "Click here to win now!")):
        for n in range(30):
            text = " ".join(f"{sentences(2, 1000 * len(kind) + 10 * n + part)} {extra}" for part in range(8))
            (tmp_path / f"{kind}-{n}.txt").write_text(text)
    return Quality(good=(f"{tmp_path}/good-*.txt",), bad=(f"{tmp_path}/bad-*.txt",), buckets=1 << 14, passage_words=60)


def test_it_tells_good_from_bad(step: Quality, sentences: Callable[[int, int], str]) -> None:
    learned = step.fit()
    assert learned.facts["accuracy"] > 0.9 and learned.facts["held_out"] > 5
    judge = step.start(learned.arrays)
    good = judge(Document(sentences(10, 1) + " The committee therefore concludes." * 4, "s/1", "s"))
    assert isinstance(good, Changed) and 0.5 < good.document.labels["quality"] <= 1
    assert isinstance(judge(Document(sentences(10, 2) + " Click here to win now!" * 4, "s/1", "s")), Dropped)
    assert np.array_equal(step.fit().arrays["weights"], learned.arrays["weights"])


def test_an_empty_document_is_no_crash(step: Quality) -> None:
    judge = step.start({"weights": np.zeros(step.buckets + 1)})
    assert isinstance(judge(Document("?!", "s/1", "s")), Changed)  # as likely good as bad


def test_too_little_to_learn_from_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words")
    with pytest.raises(DataError, match="needs 20 passages of 200 words at least"):
        Quality(good=(f"{tmp_path}/a.txt",), bad=(f"{tmp_path}/a.txt",)).fit()
