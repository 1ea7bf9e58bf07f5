"""What a tokenizer makes of texts is counted as by hand."""

from pathlib import Path

import numpy as np
import pytest

from lmjax.__main__ import parse
from lmjax.data.config import TokenizerConfig
from lmjax.data.curate.curate import curate
from lmjax.data.curate.recipe import CurateConfig
from lmjax.data.tokenizers.load import train_tokenizer
from lmjax.data.tokenizers.report import Usage, measure
from lmjax.data.tokenizers.tokenizer import Tokenizer

TEXTS = ["a few words", "and a few more, naïve ones", "خانه‌ها", ""]


def of(tokenizer: Tokenizer, texts: list[str]) -> Usage:
    """Of texts of one group."""
    return measure(tokenizer, (("a group", text) for text in texts))["a group"]


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe", "unigram", "wordpiece"])
def test_counts_are_those_of_the_texts(kind: str) -> None:
    learned = [*TEXTS, " ".join(f"word{number * 7}" for number in range(200))]
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab=520 if kind == "wordpiece" else 320), learned)  # type: ignore[arg-type]
    usage = of(tokenizer, TEXTS)
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert usage.documents == 4 and usage.tokens == sum(map(len, ids))
    assert usage.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert usage.characters == sum(map(len, TEXTS))
    assert (usage.unknown, usage.refused, usage.inexact) == (0, 0, 0)
    assert np.array_equal(usage.counts, np.bincount(np.concatenate(ids).astype(int), minlength=tokenizer.vocab_size))


def test_a_group_may_be_called_all() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="bytes"), ())
    usages = measure(tokenizer, [("all", "abc"), ("some", "de")])
    assert [(name, usage.tokens) for name, usage in usages.items()] == [("all", 3), ("some", 2), ("(all)", 5)]


def test_what_cannot_be_represented_is_told_apart() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="chars"), ["abc"])
    usage = of(tokenizer, ["abc", "xbc", "cab"])
    if tokenizer.unknown_id is None:
        assert (usage.refused, usage.inexact, usage.tokens, usage.text_bytes) == (1, 0, 6, 6)
    else:
        assert (usage.refused, usage.inexact, usage.unknown) == (0, 1, 1)


def test_unknown_symbols_are_counted(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"word": 0, "</s>": 1, "?": 2}, unk_token="?")
    foreign = tokenizers.Tokenizer(model)
    foreign.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    foreign.save(str(tmp_path / "tokenizer.json"))
    given = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"))
    usage = of(train_tokenizer(given, ()), ["word other word new", "word"])
    assert (usage.unknown, usage.refused, usage.tokens) == (2, 0, 5)
    assert usage.inexact >= 1


def test_the_command_prints_a_line_for_each_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(TokenizerConfig(kind="bytes"), ()).save(tmp_path / "tokenizer")  # type: ignore[arg-type]
    for name, text in (("a.txt", "naïve"), ("b.txt", "plain text")):
        (tmp_path / name).write_text(text)
    arguments = parse(["tokenizer", f"{tmp_path}/tokenizer", f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"])
    assert arguments.function(arguments) == 0
    head, first, second, both, vocabulary, longest = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["documents", "bytes", "tokens", "bytes/token"]
    assert first.split()[1:] == ["1", "6", "6", "1.000", "0.833", "0", "0", "0"]
    assert second.split()[1:] == ["1", "10", "10", "1.000", "1.000", "0", "0", "0"]
    assert both.split()[1:] == ["2", "16", "16", "1.000", "0.938", "0", "0", "0"]
    assert "12 of them used" in vocabulary and longest.startswith("longest of these: ")


def test_the_command_tells_sources_and_languages_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a curation by what it says of its documents, of others by what they are."""
    pytest.importorskip("py3langid")
    train_tokenizer(TokenizerConfig(kind="bytes"), ()).save(tmp_path / "tokenizer")  # type: ignore[arg-type]
    texts = {"de": "Das Schiff verließ den Hafen im Morgengrauen.", "en": "The ship left the harbour at dawn, unseen."}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    sources = {"ours": (str(tmp_path / "de.txt"),), "theirs": (str(tmp_path / "en.txt"),)}
    curate(CurateConfig(sources=sources, steps=({"step": "language"},), workers=1), tmp_path / "out", progress=False)

    def rows(*flags: str) -> dict[str, int]:
        arguments = parse(["tokenizer", f"{tmp_path}/tokenizer", *flags])
        assert arguments.function(arguments) == 0
        return {line.split()[0]: int(line.split()[2]) for line in capsys.readouterr().out.splitlines()[1:-2]}

    sizes = {name: len(text.encode()) for name, text in texts.items()}
    total = sum(sizes.values())
    assert rows(f"{tmp_path}/out") == {"ours": sizes["de"], "theirs": sizes["en"], "all": total}
    assert rows(f"{tmp_path}/out", "--by=language") == sizes | {"all": total}
    assert rows(f"{tmp_path}/de.txt", f"{tmp_path}/en.txt", "--by=language") == sizes | {"all": total}
