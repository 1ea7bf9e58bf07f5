"""Damaged tokenizers of every kind, in a process of their own: `python -m tests.faults.broken_tokenizers DIR COUNT`."""

import contextlib
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import tokenizers

from lmjax.data.config import TokenizerConfig
from lmjax.data.tokenizers.load import load_tokenizer, train_tokenizer
from lmjax.errors import DataError
from tests.faults.mutations import as_text, damaged, odd_document, refused


def tokenizer_files(directory: Path) -> Iterator[Path]:
    texts = ["the cat sat on the mat and the dog ran away from it all " * 20, "zeroth first second third fourth"]
    for kind, vocab in (("bytes", 257), ("chars", 32), ("bpe", 280), ("unigram", 280)):
        train_tokenizer(TokenizerConfig(kind=kind, vocab=vocab), iter(texts)).save(directory / kind)
        yield from sorted((directory / kind).iterdir())
    (directory / "foreign").mkdir()
    yield Path(shutil.copy(directory / "unigram" / "tokenizer.model", directory / "foreign"))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    (directory / "hf").mkdir()
    tokenizer.save(str(directory / "hf" / "tokenizer.json"))
    yield directory / "hf" / "tokenizer.json"


def one_tokenizer(files: list[Path], number: int) -> None:
    rng = random.Random(f"tokenizer {number}")
    path = rng.choice(files)
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_bytes(as_text(odd_document(json.loads(content), rng), rng).encode("utf-8", "backslashreplace"))
    else:
        path.write_bytes(damaged(content, rng))
    with refused(number):
        tokenizer = load_tokenizer(path.parent)
        text = "the cat\n sat on  it \u00e9\t"
        with contextlib.suppress(DataError):  # a character that it does not know
            ids = tokenizer.encode(text)
            assert all(0 <= index < tokenizer.vocab_size for index in ids), number
            tokenizer.decode(ids)
        assert 0 <= tokenizer.endoftext_id < tokenizer.vocab_size, number
        tokenizer.save(path.parent.parent / "again")
    path.write_bytes(content)


if __name__ == "__main__":
    found = list(tokenizer_files(Path(sys.argv[1])))
    for one in range(int(sys.argv[2])):
        print(one, flush=True)
        one_tokenizer(found, one)
    print(f"{sys.argv[2]} tokenizers")
