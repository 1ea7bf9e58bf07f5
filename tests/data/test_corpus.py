"""Which documents are for validation, and what the tokenizer learns from."""

import itertools

import pytest

from lmjax.data.config import PrepareConfig
from lmjax.data.prepare.corpus import (
    Omitted,
    Text,
    documents_needed,
    read_corpus,
    sample_passages,
    validation_documents,
)
from lmjax.data.prepare.sources import list_inputs
from lmjax.errors import DataError


def corpus(tmp_path, texts, **recipe):
    for number, text in enumerate(texts):
        (tmp_path / f"{number:04d}.txt").write_bytes(text.encode())
    cfg = PrepareConfig(inputs=(f"{tmp_path}/*.txt",), **recipe)
    omitted = Omitted()
    return list(read_corpus(list_inputs(cfg.inputs), cfg, cfg.split, lambda n_bytes: None, omitted)), omitted


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.5, 0.77, 1.0])
def test_validation_has_its_share_of_any_corpus(fraction):
    chosen = list(itertools.takewhile(lambda index: index < 5000, validation_documents(0, fraction)))
    assert chosen == sorted(set(chosen))
    for n in range(0, 5000, 7):
        assert abs(sum(index < n for index in chosen) - n * fraction) <= 2
    assert chosen[0] < documents_needed(fraction)


def test_validation_depends_on_the_seed_alone():
    draws = [tuple(itertools.islice(validation_documents(seed, 0.1), 50)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_empty_documents_are_left_out_and_white_space_is_not(tmp_path):
    texts, omitted = corpus(tmp_path, ["a", "", " \n", "b"], valid_fraction=0.0)
    assert [text for _, text, _ in texts] == ["a", " \n", "b"]
    assert {split for _, _, split in texts} == {"train"} and omitted == Omitted(empty=1)


def test_tail_split_is_that_of_nanogpt(tmp_path, reference):
    data = (reference / "tinyshakespeare" / "input.txt").read_text()
    texts, _ = corpus(tmp_path, [data], split="tail", valid_fraction=0.1)
    n = int(len(data) * 0.9)
    assert [(text, split) for _, text, split in texts] == [(data[:n], "train"), (data[n:], "valid")]


def test_tail_split_takes_one_text(tmp_path):
    with pytest.raises(DataError, match=r"prepare.split=tail takes one text, but .*0001.txt follows"):
        corpus(tmp_path, ["a", "b"], split="tail")


def test_normalizations_are_as_declared(tmp_path):
    text = "e\u0301\r\nﬁ\rx"
    for recipe, expected in (
        ({}, text),
        ({"normalize": "nfc"}, "é\r\nﬁ\rx"),
        ({"normalize": "nfkc", "newlines": "unix"}, "é\nfi\nx"),
    ):
        assert corpus(tmp_path, [text], valid_fraction=0.0, **recipe)[0][0].text == expected


def test_the_sample_is_all_of_a_small_corpus_and_a_random_part_of_a_large_one():
    texts = [Text(str(n), f"{n}," * 2000, "valid" if n % 3 == 0 else "train") for n in range(60)]
    everything = "".join(text for _, text, split in texts if split == "train")
    assert "".join(sample_passages(iter(texts), 10**9, 0)) == everything
    part = sample_passages(iter(texts), 50_000, 0)
    assert 30_000 < sum(map(len, part)) <= 50_000 and set(part) <= {text for _, text, _ in texts}
    assert part == sample_passages(iter(texts), 50_000, 0) != sample_passages(iter(texts), 50_000, 1)
    one_large = sample_passages(iter([Text("a", "word " * 100_000, "train")]), 50_000, 0)
    assert 30_000 < sum(map(len, one_large)) <= 50_000
