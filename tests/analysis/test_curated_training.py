"""The dirty corpus of the training study has the dirt that it says, and its table pairs runs by their seeds."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from analysis.bench import dirt
from analysis.bench.curated_training import COPIED, CORPORA, SHARES, dirty_corpus, mean, table, workdir


@pytest.fixture
def books() -> list[str]:
    rng = random.Random(0)
    return ["\n\n".join(" ".join(f"w{rng.randrange(10**6)}" for _ in range(70)) for _ in range(4)) for _ in range(300)]


def test_dirt_has_its_shares_of_the_bytes(books: list[str]) -> None:
    documents = dirty_corpus(books, ["بیت دیگر " * 60], random.Random(0))
    sizes = Counter[str]()
    for what, text in documents:
        sizes[what] += len(text.encode())
    for what, share in SHARES.items():
        assert sizes[what] / sizes.total() == pytest.approx(share, abs=0.01)
    kinds = list(SHARES)
    originals = set(books[:COPIED])
    assert sum(what == kinds[0] for what, _ in documents) == len(books)
    assert {text for what, text in documents if what == kinds[1]} <= originals
    for text in [text for what, text in documents if what == kinds[2]][:10]:
        assert max(dirt.jaccard(text, original) for original in originals) >= 0.8


def test_of_private_passages_the_rest_of_the_text_is_wanted_as_it_was() -> None:
    rng = random.Random(0)
    text = "some words and some more of them"
    for what in dirt.PRIVATE:
        case = dirt.private(text, what, rng)
        assert case.wanted is not None and re.sub(r" \(<\w+>\)", "", case.wanted) == text != case.text
        public = dirt.public(text, rng)
        assert public.wanted == public.text != text


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    for place, name in enumerate(CORPORA):
        (tmp_path / name).mkdir()
        (tmp_path / name / "curation.json").write_text(json.dumps({"steps": [{"kept": [10, 1000]}]}))
        for seed in range(3):
            folder = workdir(tmp_path, name, seed)
            folder.mkdir(parents=True)
            summary = {"val_full/own/bpb": 2.0 + seed - 0.25 * place, "epochs/own": 1.0}
            (folder / "summary.json").write_text(json.dumps(summary))
    lines = list(table(3, tmp_path))
    assert lines[2].endswith(f"| {mean([2.0, 3.0, 4.0])} |  |")
    assert [line.split(" | ")[-1] for line in lines[3:]] == [f"{gain:.4f} ± 0.0000 |" for gain in (0.25, 0.5, 0.75)]
