"""Prepared conversations: what is stored is what was scored, whoever encodes; bad ones leave nothing behind."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax.__main__ import parse
from lmjax.data.chat.rendering import Renderer
from lmjax.data.chat.scoring import encode_conversation
from lmjax.data.chat.templates import load_template
from lmjax.data.config import ChatConfig, DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from lmjax.data.loader import Loader
from lmjax.data.packing import packed_batches
from lmjax.data.prepare.prepare import prepare
from lmjax.data.store.dataset import open_dataset, verify_dataset
from lmjax.data.tokenizers.alphabets import ByteTokenizer
from lmjax.errors import DataError

pytest.importorskip("jinja2")

CONVERSATIONS = [{"prompt": f"{n} + {n % 3}?", "response": f"{n + n % 3}" + "!" * (n % 5)} for n in range(40)]
BYTES = TokenizerConfig(kind="bytes")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in CONVERSATIONS))
    return path


def recipe(path: Path, workers: int = 1, valid_fraction: float = 0.1, **chat: Any) -> PrepareConfig:
    chat = {"template": "instruction"} | chat
    return PrepareConfig(
        inputs=(str(path),),
        tokenizer=BYTES,
        chat=ChatConfig(**chat),
        valid_fraction=valid_fraction,
        shard_tokens=600,
        workers=workers,
    )


def test_what_is_stored_is_what_was_scored(lines: Path, tmp_path: Path) -> None:
    """In shards, by several workers or by none, from lines or from a list."""
    manifest = prepare(recipe(lines), tmp_path / "one", progress=False)
    others = [prepare(recipe(lines, workers=2), tmp_path / "two", progress=False)]
    (tmp_path / "some.json").write_text(json.dumps(CONVERSATIONS))
    others.append(prepare(recipe(tmp_path / "some.json"), tmp_path / "list", progress=False))
    assert {other.fingerprint for other in others} == {manifest.fingerprint}
    dataset = verify_dataset(tmp_path / "one")
    with Renderer(load_template(tmp_path / "one" / "tokenizer")) as renderer:
        cfg = ChatConfig(template="instruction")
        whole = [encode_conversation(json.dumps(one), ByteTokenizer(), renderer, cfg) for one in CONVERSATIONS]
    assert len(dataset.split("train").shards) > 1
    found = []
    for split in (dataset.split("train"), dataset.split("valid")):
        starts, lengths = split.document_starts[:-1], np.diff(split.document_starts)
        backwards = np.arange(split.n_documents)[::-1]
        tokens = np.split(split.take(starts[backwards], lengths[backwards]), np.cumsum(lengths[backwards])[:-1])
        scored = np.split(split.weights(starts[backwards], lengths[backwards]), np.cumsum(lengths[backwards])[:-1])
        found += [(one.tolist(), bits.tolist()) for one, bits in zip(tokens, scored, strict=True)]
        assert split.n_scored == sum(bits.sum() for bits in scored)
    assert sorted(found) == sorted((one.tokens, (one.weights / 100).tolist()) for one in whole)
    assert sum(split.text_bytes for split in manifest.splits.values()) == sum(one.n_bytes for one in whole)
    assert manifest.splits["valid"].documents == 4


def test_other_bits_make_another_data_set(lines: Path, tmp_path: Path) -> None:
    """The tokens are the same; what is trained on is not, and so neither is what names the order of samples."""
    digests = set()
    for name, ends in (("with", True), ("without", False)):
        prepare(recipe(lines, ends=ends), tmp_path / name, progress=False)
        data = DataConfig(sources={"a": SourceConfig(path=str(tmp_path / name))}, seq_len=64, documents="whole")
        digests |= {open_dataset(tmp_path / name).split("train").digest, Loader(data, batch_size=2).fingerprint}
    assert len(digests) == 4


def weighed(path: Path) -> Path:
    """The conversations with responses that count half, a third or in full, in lines of their own."""
    with path.open("w") as file:
        for number, one in enumerate(CONVERSATIONS):
            response = {"role": "assistant", "content": one["response"], "weight": (0.5, 0.33, 1)[number % 3]}
            file.write(json.dumps({"messages": [{"role": "user", "content": one["prompt"]}, response]}) + "\n")
    return path


def test_weights_are_of_training_alone(lines: Path, tmp_path: Path) -> None:
    """A batch has them as they were given, whoever encodes; validation counts all that is scored alike."""
    prepare(recipe(lines), tmp_path / "even", progress=False)
    uneven = weighed(tmp_path / "uneven.jsonl")
    one, two = (prepare(recipe(uneven, n), tmp_path / str(n), progress=False).fingerprint for n in (1, 2))
    assert one == two
    rows, fingerprints = [], set()
    for name in ("even", "1"):
        split = open_dataset(tmp_path / name).split("train")
        data = DataConfig(sources={"a": SourceConfig(path=str(tmp_path / name))}, seq_len=128, documents="whole")
        loader = Loader(data, batch_size=1)
        rows.append(loader.batches(0, loader._sources[0].per_epoch))
        fingerprints |= {split.digest, loader.fingerprint}
        scored = [batch.weights_BT for batch in packed_batches(split, 128, 4)]
        assert sum(x_BT.sum() for x_BT in scored) == split.n_scored and set(np.unique(scored)) == {0.0, 1.0}
    assert len(fingerprints) == 4
    for even, found in zip(*rows, strict=True):
        np.testing.assert_array_equal(found.tokens_BT, even.tokens_BT)
        np.testing.assert_array_equal(found.weights_BT > 0, even.weights_BT)
        for segment in range(found.segments_BT.max() + 1):
            mine = found.segments_BT == segment
            number, *_ = ByteTokenizer().decode(found.tokens_BT[mine].tolist()).removeprefix("[instruction]\n").split()
            expected = np.float32((0.5, 0.33, 1)[int(number) % 3])
            assert set(found.weights_BT[mine].tolist()) == {0.0, expected}


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    prepare(recipe(weighed(tmp_path / "lines.jsonl")), tmp_path / "data", progress=False)
    rng = random.Random(0)
    files = [path for end in ("scored", "weights") for path in sorted((tmp_path / "data").glob(f"*.{end}"))]
    assert len(files) == 2 * len(list((tmp_path / "data").glob("*.tokens")))
    for path in files:
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=path.name):
            open_dataset(tmp_path / "data").split("valid" if path.name.startswith("valid") else "train")
        with pytest.raises(DataError, match=path.name):
            verify_dataset(tmp_path / "data")
        path.unlink()
        with pytest.raises(DataError, match=f"{path.name} is missing"):
            open_dataset(tmp_path / "data")
        path.write_bytes(content)
    verify_dataset(tmp_path / "data")
    (tmp_path / "data" / "tokenizer" / "chat_template.jinja").write_text("another")
    with pytest.raises(DataError, match=r"the chat template in .* is not the one that the data set was made with"):
        open_dataset(tmp_path / "data")


def test_samples_are_weighed_by_what_is_scored(lines: Path, tmp_path: Path) -> None:
    prepare(recipe(lines), tmp_path / "data", progress=False)
    sources = {"a": SourceConfig(path=str(tmp_path / "data"))}
    loader = Loader(DataConfig(sources=sources, seq_len=128, documents="whole"), batch_size=4)
    split, batches = open_dataset(tmp_path / "data").split("train"), loader.batches(0, 50)
    per_epoch = loader._sources[0].per_epoch
    assert loader.epoch(3 * per_epoch) == {"a": 3.0}
    weights = np.concatenate([batch.weights_BT for batch in batches])[:per_epoch]
    assert weights.sum() == split.n_scored
    spelled = np.concatenate([batch.targets_BT[batch.weights_BT > 0] for batch in batches])
    assert b"[end]" in bytes(token for token in spelled.tolist() if token < 256)
    for documents in ("joined", "separate"):
        with pytest.raises(DataError, match="holds conversations, of which only some tokens are scored"):
            Loader(DataConfig(sources=sources, seq_len=32, documents=documents), batch_size=4)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("line", "chat", "message"),
    [
        ('{"prompt": "a"}', {}, r"some.jsonl, line 41: no string under 'response' but fields \['prompt'\]"),
        ('{"prompt": "a", "response": ""}', {}, "some.jsonl, line 41: its 'response' is empty"),
        ('{"prompt": ', {}, "some.jsonl, line 41: not JSON: "),
        (
            '{"prompt": "' + "a" * 99 + '", "response": "b"}',
            {"longest": 99},
            r"line 41: 137 tokens, 130 of them before",
        ),
        ("{}", {"template": "tokenizer"}, "has no chat template"),
        ("{}", {"template": "{}.jinja"}, "cannot read .*.jinja"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_left(
    line: str, chat: dict[str, Any], message: str, workers: int, lines: Path, tmp_path: Path
) -> None:
    lines.write_text(lines.read_text() + line + "\n")
    cfg = dataclasses.replace(recipe(lines, workers=workers, **chat), shard_tokens=1 << 20)
    with pytest.raises(DataError, match=message) as caught:
        prepare(cfg, tmp_path / "data", progress=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not (tmp_path / "data").exists()
    lines.write_text("".join(json.dumps(one) + "\n" for one in CONVERSATIONS))
    prepare(recipe(lines), tmp_path / "data", progress=False)


def test_what_was_cut_is_counted(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["[instruction]\n{prompt}[end]\n[response]\n{response}[end]".format(**one) for one in CONVERSATIONS]
    longer = sum(len(text) + 1 > 45 for text in texts)
    assert 0 < longer < 40
    manifest = prepare(recipe(lines, longest=45, too_long="left"), tmp_path / "data")
    assert sum(split.truncated_documents for split in manifest.splits.values()) == longer
    assert f"note: {longer} of 40 conversations were cut at their left to 45 tokens" in capsys.readouterr().err
    assert np.diff(open_dataset(tmp_path / "data").split("train").document_starts).max() == 45


def test_too_few_to_validate_leave_nothing(lines: Path, tmp_path: Path) -> None:
    """No conversation is cut to have some: its tail would be no conversation."""
    lines.write_text(json.dumps(CONVERSATIONS[0]))
    with pytest.raises(DataError, match=r"none of the 1 documents fell to validation|no training documents"):
        prepare(recipe(lines), tmp_path / "data", progress=False)
    assert not (tmp_path / "data").exists()
    assert "valid" not in prepare(recipe(lines, valid_fraction=0.0), tmp_path / "data", progress=False).splits


def test_another_recipe_is_named(lines: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    cfg = recipe(lines, template=str(template), score="all")
    first = prepare(cfg, tmp_path / "data", progress=False)
    assert prepare(cfg, tmp_path / "data", progress=False) == first
    for other in (dataclasses.replace(cfg, chat=None), recipe(lines, template=str(template))):
        with pytest.raises(DataError, match="was prepared differently: chat was"):
            prepare(other, tmp_path / "data", progress=False)
    template.write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    with pytest.raises(DataError, match=r"the chat template .*own.jinja changed since"):
        prepare(cfg, tmp_path / "data", progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": TokenizerConfig(kind="bpe")}, "prepare.chat needs a tokenizer that is there already"),
        ({"normalize": "nfc"}, "prepare.normalize=nfc is for texts"),
        ({"split": "tail"}, "prepare.split=tail is for texts"),
    ],
)
def test_what_is_for_texts_is_refused(settings: dict[str, Any], message: str, lines: Path) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipe(lines), **settings)
    with pytest.raises(ValueError, match="there is no template 'chatm'; choose one of instruction, alpaca, chatml"):
        ChatConfig(template="chatm")


def test_the_command_shows_what_is_scored(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {"prompt": "\x1b[2J2?", "response": "é\u202e"}
    lines.write_text(json.dumps(first) + "\n" + lines.read_text())
    words = ["prepare", str(lines), "--chat=chatml", "--tokenizer=bytes", "--valid-fraction=0", "--workers=1"]
    expected = "<|im_start|>user\n\\x1b[2J2?<|im_end|>\n<|im_start|>assistant\n", "é\\u202e<|im_end|>\n<|endoftext|>"

    def said(*more: str) -> str:
        arguments = parse([*words, *more])
        assert arguments.function(arguments) == 0
        return capsys.readouterr().out

    out = said(f"--out={tmp_path / 'data'}")
    said_first, written_first = ("\x1b[2J2?", "é\u202e<|im_end|>\n")
    prompts = [said_first, *(one["prompt"] for one in CONVERSATIONS)]
    written = [written_first, *(one["response"] + "<|im_end|>\n" for one in CONVERSATIONS)]
    scored = sum(len(text.encode()) + 1 for text in written)
    around = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    tokens = scored + sum(len(around) + len(prompt) for prompt in prompts)
    assert f"train: 41 conversations, {tokens:,} tokens, {scored:,} scored" in out
    assert out.endswith("scored between >> and <<\n{}>>{}<<\n".format(*expected))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert said(f"--out={tmp_path / 'data'}").endswith("in colour\n{}\x1b[1;32m{}\x1b[0m\n".format(*expected))
    other = said(f"--out={tmp_path / 'other'}", "--no-ends", "--headers")
    assert "\x1b[1;32m<|im_start|>assistant\né\\u202e\x1b[0m<|im_end|>\n<|endoftext|>\n" in other
