"""The compression baseline is what the xz program would say."""

import lzma
import random
from pathlib import Path

import pytest

from lmjax.config import Config
from lmjax.data.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from lmjax.errors import DataError
from lmjax.evaluate import baselines, compression
from lmjax.evaluate.compression import primed_xz_bits_per_byte, xz_bits_per_byte
from lmjax.tasks import pretrain
from lmjax.train.config import TrainConfig

WORDS = [f"{'bcdfghklmnprst'[i % 14]}{'aeiou'[i % 5]}{'lmnrst'[i % 6]}{i % 17}" for i in range(400)]


def prose(seed: int, words: int) -> bytes:
    draw = random.Random(seed)
    return " ".join(draw.choices(WORDS, k=words)).encode()


def test_alone_it_is_xz_9e() -> None:
    data = prose(0, 20_000)
    program = len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    assert abs(xz_bits_per_byte(data) * len(data) / 8 - program) <= 4  # the header names another dictionary


def test_priming_counts_what_the_text_adds() -> None:
    train, data = prose(0, 20_000), prose(1, 2_000)
    assert primed_xz_bits_per_byte(train, data) < 0.95 * xz_bits_per_byte(data)
    assert primed_xz_bits_per_byte(data, data) < 0.1
    assert primed_xz_bits_per_byte(b"", data) == pytest.approx(xz_bits_per_byte(data), rel=0.02)


def test_the_dictionary_reaches_back_to_the_start() -> None:
    """A text repeated after much noise is still found."""
    data = prose(0, 3_000)
    noise = random.Random(1).randbytes(1 << 20)
    assert primed_xz_bits_per_byte(data + noise, data) < 0.1 * xz_bits_per_byte(data)


def test_what_cannot_be_compressed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no text to compress"):
        xz_bits_per_byte(b"")
    with pytest.raises(DataError, match="no text to compress"):
        primed_xz_bits_per_byte(b"abc", b"")
    monkeypatch.setattr(compression, "LARGEST", 1 << 13)
    with pytest.raises(DataError, match="do not fit xz's dictionary"):
        primed_xz_bits_per_byte(bytes(1 << 13), b"abc")


def test_it_reads_all_shards_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a text is cut into shards, xz says the same of it; and what is too long is refused before training."""
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_bytes(prose(number, 300))
    found = {}
    for shard_tokens in (1 << 26, 9_000):
        recipe = PrepareConfig(
            inputs=(f"{tmp_path}/*.txt",),
            tokenizer=TokenizerConfig(kind="bytes"),
            valid_fraction=0.3,
            shard_tokens=shard_tokens,
            workers=1,
        )
        source = SourceConfig(path=f"{tmp_path}/{shard_tokens}", prepare=recipe)
        cfg = Config(data=DataConfig(sources={"a": source}), train=TrainConfig(compression_baseline=True))
        data = pretrain.open_data(cfg)
        assert len(data.datasets["a"].split("valid").shards) == (2 if shard_tokens == 9_000 else 1)
        found[shard_tokens] = baselines.compression_baselines(data.datasets, data.tokenizer)
    one, several = found.values()
    assert one.keys() == {"val_full/a/xz_bpb", "val_full/a/xz_primed_bpb"} and one == several
    monkeypatch.setattr(compression, "LARGEST", (1 << 27) + 1000)
    with pytest.raises(DataError, match=r"'a' has .* bytes, more than the 1,000 .* train.compression_baseline=False"):
        pretrain.open_data(cfg)
