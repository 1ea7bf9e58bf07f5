"""BLEU, chrF and ROUGE are what the libraries' own commands print of the same files; METEOR is nltk's."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from lmjax.errors import ConfigError
from lmjax.evaluate.texts import overlap

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

TEXTS = [
    "The cat sat on the mat, and it was happy.",
    "A dog runs in the park today!",
    "One day Tom went to the sea with his mom.",
    "There was nobody in it.",
]
REFERENCES = [
    "The cat sat on a mat and was happy.",
    "Today a dog ran in the big park.",
    "One day, Tom went to the beach with his mother.",
    "Nobody was there.",
]
SECOND = ["A cat was sitting on the mat.", "A dog runs in the park.", "Tom was at the sea.", "There was nobody."]


def write(path: Path, lines: list[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_bleu_and_chrf_of_sacrebleu_s_command(tmp_path: Path) -> None:
    """To the last digit that it prints, with several references and with its intervals."""
    references = [write(tmp_path / name, lines) for name, lines in (("a", REFERENCES), ("b", SECOND))]
    asked = ["-i", write(tmp_path / "texts", TEXTS), "-m", "bleu", "chrf", "-w", "6", "--confidence"]
    command = [sys.executable, "-m", "sacrebleu", *references, *asked]
    printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = overlap.of_all(TEXTS, list(zip(REFERENCES, SECOND, strict=True)))
    for one, (number, signature) in zip(printed, found.values(), strict=True):
        assert round(number.value, 6) == one["score"]
        assert (number.high - number.low) / 2 == pytest.approx(one["confidence_var"], abs=1e-4)
        assert number.low < one["confidence_mean"] < number.high
        assert signature == one["signature"].replace("bs:1000|seed:12345|", "")
    assert list(found) == ["bleu", "chrf"] and found["bleu"][0].value > 20


def test_texts_that_have_nothing_in_common() -> None:
    """Resamples without a word in common, on which sacrebleu's own intervals fail; and one text, which has none."""
    number, _ = overlap.of_all(["", "x y z", "The cat sat on a mat."], [(one,) for one in REFERENCES[:3]])["bleu"]
    assert number.low == 0 and number.low <= number.value <= number.high
    assert math.isnan(overlap.of_all(TEXTS[:1], [(REFERENCES[0],)])["chrf"][0].stderr)


def test_texts_may_have_different_numbers_of_references() -> None:
    found = overlap.of_all(TEXTS[:2], [(REFERENCES[0],), (REFERENCES[1], SECOND[1])])
    assert "nrefs:var" in found["bleu"][1]
    assert found["bleu"][0].value > overlap.of_all(TEXTS[:2], [(REFERENCES[0],), (REFERENCES[1],)])["bleu"][0].value


def test_rouge_of_its_own_command(tmp_path: Path) -> None:
    """To the last digit that it prints."""
    files = [write(tmp_path / "references", REFERENCES), write(tmp_path / "texts", TEXTS), str(tmp_path / "out.csv")]
    flags = ("--target_filepattern", "--prediction_filepattern", "--output_filename")
    pairs = [word for pair in zip(flags, files, strict=True) for word in pair]
    subprocess.run([sys.executable, "-m", "rouge_score.rouge", *pairs, "--noaggregate"], check=True)
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    for text, reference, row in zip(TEXTS, REFERENCES, rows, strict=True):
        found = overlap.of_each(text, [reference])
        for name in ("rouge1", "rouge2", "rougeL"):
            assert f"{found[name]:f}" == f"{float(row[f'{name}-F']):f}"
    assert float(rows[0]["rouge1-F"]) > 0.8


def test_the_nearest_reference_counts() -> None:
    both, second = (overlap.of_each(TEXTS[1], refs) for refs in ([REFERENCES[1], SECOND[1]], [SECOND[1]]))
    assert both["rouge1"] == second["rouge1"] > overlap.of_each(TEXTS[1], [REFERENCES[1]])["rouge1"]


def test_meteor_is_left_out_without_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "has_wordnet", lambda: False)
    assert "meteor" not in overlap.of_each("a", ["a"])
    assert "python -m nltk.downloader wordnet" in overlap.signatures()["meteor"]


def test_meteor_knows_stems_and_synonyms() -> None:
    if not overlap.has_wordnet():
        pytest.skip("nltk finds no WordNet")
    whole = "It is a guide to action which ensures that the military always obeys the commands of the party"
    reference = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert overlap.of_each(whole, [reference])["meteor"] == pytest.approx(0.6944, abs=1e-4)  # as nltk documents
    assert overlap.of_each("the auto stopped", ["the car stops"])["meteor"] > 0.9


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(overlap._PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(
        ConfigError, match=r"no-such-package, by which texts are judged, is missing: install lmjax\[eval\]"
    ):
        overlap.check()
