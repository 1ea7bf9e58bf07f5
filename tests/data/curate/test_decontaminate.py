"""Items of evaluation sets are found wherever they stand, counted by set, and cut out without a trace."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lmjax.data.curate.decontaminate import Decontaminate
from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.hashing import words
from lmjax.errors import DataError
from tests.data.curate.conftest import text_of


def start(step: Decontaminate) -> Callable[[str], Outcome]:
    learned = step.fit()
    check = step.start(learned.arrays)
    return lambda text: check(Document(text, "s/1", "s"))


@pytest.fixture
def sets(tmp_path: Path, sentences: Callable[[int, int], str]) -> dict[str, str]:
    qa = [{"query": sentences(3, 100 + n), "choices": ["Yes.", sentences(1, 200 + n)], "gold": 1} for n in range(5)]
    cloze = [{"context": "One two three four five six seven eight nine ten."}, {"context": "Far too short."}]
    for name, items in (("qa", qa), ("cloze", cloze)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("qa", "cloze")}


def test_planted_items_are_found_in_another_spelling(
    sets: dict[str, str], sentences: Callable[[int, int], str]
) -> None:
    check = start(Decontaminate(sets=sets))
    assert check(sentences(200, 1)) == Document(sentences(200, 1), "s/1", "s")
    for n in range(5):
        item = " ".join(sentences(3, 100 + n).upper().replace(".", " --").split()[:15])
        outcome = check(f"{sentences(50, n)}\n{item}\n{sentences(50, 50 + n)}")
        assert outcome == Dropped("holds an item of qa", (f"qa: item {n}",))
    short = "One, two; three four five six\nseven eight NINE ten"
    assert check(f"count: {short}!") == Dropped("holds an item of cloze", ("cloze: item 0",))
    assert text_of(check(short.replace("five", "fife"))) is not None
    assert text_of(check("Far too short.")) is not None


def test_thirteen_words_are_looked_for_and_not_twelve(
    sets: dict[str, str], sentences: Callable[[int, int], str]
) -> None:
    check = start(Decontaminate(sets=sets))
    item = sentences(3, 100).split()
    assert text_of(check(" ".join(["so", *item[2:14], "so"]))) is not None
    assert text_of(check(" ".join(["so", *item[2:15], "so"]))) is None


def test_items_that_cannot_be_looked_for_are_counted(sets: dict[str, str]) -> None:
    facts = Decontaminate(sets=sets).fit().facts["sets"]
    assert facts == {"qa": {"items": 5, "too_short": 0}, "cloze": {"items": 2, "too_short": 1}}


def test_what_is_cut_goes_with_its_margins(sets: dict[str, str], sentences: Callable[[int, int], str]) -> None:
    check = start(Decontaminate(sets=sets, action="cut", margin=100))
    item, before, after = sentences(3, 102), sentences(40, 7), sentences(40, 8)
    outcome = check(f"{before} {item} {after}")
    assert isinstance(outcome, Changed) and outcome.found == ("qa: item 2",)
    first, second = outcome.document.text.split("\n\n")
    end = len(item) - len(item.rstrip(".!? "))  # a run of words ends with its last letter
    assert first == before[: len(before) + 1 - 100] and second == after[100 - 1 - end :]
    assert not set(words(item)) & set(outcome.found)
    assert check(f"{before[:90]} {item} {after[:90]}") == Dropped("holds an item of qa", ("qa: item 2",))
    pieces = start(Decontaminate(sets=sets, action="cut", margin=0, most_pieces=2))
    assert text_of(pieces(f"{before} {item} {after} {item} {before}")) is None


def test_a_set_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nnot\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2 \(byte 9\): not JSON"):
        Decontaminate(sets={"a": f"{tmp_path}/a.jsonl"}).fit()
