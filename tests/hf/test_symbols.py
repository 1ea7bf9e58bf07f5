"""Tokenizers of foreign directories: the ids of transformers, what opens a text and what ends one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lmjax.data.chat.templates import special_tokens
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import DataError
from lmjax.hf.tokenizer_files import read_tokenizer, tokenizer_files
from lmjax.models.config import ModelConfig

tokenizers = pytest.importorskip("tokenizers")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

WORDS = "the little girl named Lily played in a big red park with her mum and said: naïve ☃ 1234\n\tx = y"
TEXTS = [
    "Lily said",
    " leading and trailing ",
    "  two  and   three\n\tline  \n\n",
    "Ünseen 𝔘 漢字",
    "it's 1234 the the" * 9,
]
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MODEL = ModelConfig(vocab=400)


def write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


def read(directory: Path) -> Tokenizer:
    tokenizer, _ = read_tokenizer(directory, MODEL)
    assert tokenizer is not None
    return tokenizer


# Directories ----------------------------------------------------------------------------------------------------------


def sentencepiece_model(directory: Path, *, prefix: bool) -> None:
    """tokenizer.model as Llama's (a space in front of every text) or Gemma's (none)."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 20),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        split_digits=True,
        minloglevel=3,
    )


def merges(directory: Path) -> None:
    """vocab.json and merges.txt as GPT-2's."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([WORDS] * 20, vocab_size=330, show_progress=False, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(directory))


def json_file(directory: Path, opening: str | None = None, end: str = "</s>") -> None:
    """tokenizer.json, which puts `opening` in front of a text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", end])
    if opening is not None:
        special = [(opening, tokenizer.token_to_id(opening))]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(f"{opening} $A", special_tokens=special)
    tokenizer.save(str(directory / "tokenizer.json"))


def like_transformers(directory: Path) -> None:
    """The same ids as its AutoTokenizer, the same text of them, the same symbols."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(directory), read(directory)
    begin = [] if ours.begin_id is None else [ours.begin_id]
    for text in TEXTS:
        # In front of a space transformers 5 puts no other one, as SentencePiece (and version 4 with it) does.
        text = text.lstrip(" ") if ours.prefix else text
        ids = ours.encode(text)
        assert begin + ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text
    assert ours.endoftext == theirs.eos_token
    symbols = f"Lily{theirs.eos_token}a b{theirs.eos_token}"
    assert ours.encode_symbols(symbols) == theirs(symbols, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "GemmaTokenizer"])
def test_a_sentencepiece_model_alone(tmp_path: Path, name: str, add: bool) -> None:
    sentencepiece_model(tmp_path, prefix=name == "LlamaTokenizer")
    write(tmp_path / "tokenizer_config.json", **LLAMA | {"tokenizer_class": name, "add_bos_token": add})
    like_transformers(tmp_path)
    assert read(tmp_path).begin_id == (1 if add else None)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2TokenizerFast", None])
def test_a_vocabulary_and_merges(tmp_path: Path, name: str | None) -> None:
    merges(tmp_path)
    write(tmp_path / "config.json", model_type="gpt2" if name != "Qwen2TokenizerFast" else "qwen2")
    if name is not None:
        settings = {"tokenizer_class": name, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        added = {"330": {"content": "<|im_end|>", "special": True}, "331": {"content": "<tool>", "special": False}}
        write(tmp_path / "tokenizer_config.json", **settings, added_tokens_decoder=added)
    like_transformers(tmp_path)


def test_a_vocabulary_and_merges_that_are_not_read(tmp_path: Path) -> None:
    merges(tmp_path)
    write(tmp_path / "tokenizer_config.json", tokenizer_class="CodeGenTokenizer")
    with pytest.raises(DataError, match=r"merges\.txt of a CodeGenTokenizer are not read; save it as tokenizer\.json"):
        read(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for content in ("a b c\n", "a nosuch\n"):
        (tmp_path / "merges.txt").write_text(content)
        with pytest.raises(DataError, match=r"vocab\.json and merges\.txt are damaged"):
            read(tmp_path)


@pytest.mark.parametrize("opening", [None, "<s>"])
def test_a_tokenizer_json(tmp_path: Path, opening: str | None) -> None:
    json_file(tmp_path, opening)
    write(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>")
    like_transformers(tmp_path)
    assert read(tmp_path).begin_id == (None if opening is None else 256)


def test_what_we_write_is_read_the_same(tmp_path: Path) -> None:
    """A tokenizer.model with a begin symbol, with and without the settings that it came with."""
    for prefix in (True, False):
        source, out = tmp_path / f"from{prefix}", tmp_path / f"to{prefix}"
        source.mkdir()
        out.mkdir()
        sentencepiece_model(source, prefix=prefix)
        tokenizer = read(source)
        assert tokenizer.begin_id == 1
        for name, content in tokenizer_files(tokenizer, {}, 64).items():
            (out / name).write_bytes(content)
        again = read(out)
        assert (again.hash, again.begin_id) == (tokenizer.hash, 1)
        like_transformers(out)


# Begin and end --------------------------------------------------------------------------------------------------------


def test_a_model_file_opens_with_its_begin_symbol_unless_told_otherwise(tmp_path: Path) -> None:
    """Its documented default; transformers 5 without the field leaves it out, and earlier versions did not."""
    sentencepiece_model(tmp_path, prefix=True)
    assert read(tmp_path).begin_id == 1
    write(tmp_path / "tokenizer_config.json", **LLAMA)
    assert read(tmp_path).begin_id == 1
    write(tmp_path / "tokenizer_config.json", **LLAMA | {"bos_token": "</s>"})
    assert read(tmp_path).begin_id == 2
    write(tmp_path / "tokenizer_config.json", **LLAMA | {"add_bos_token": False})
    assert read(tmp_path).begin_id is None


def test_the_end_symbol_and_where_it_is_named(tmp_path: Path) -> None:
    json_file(tmp_path, end="[END]")
    with pytest.raises(DataError, match=r"has no symbol <\|endoftext\|> or .*; name its end of text"):
        read(tmp_path)
    write(tmp_path / "special_tokens_map.json", eos_token={"content": "[END]", "lstrip": False})
    assert read(tmp_path).endoftext == "[END]"
    write(tmp_path / "tokenizer_config.json", eos_token="<s>")
    assert read(tmp_path).endoftext == "<s>"
    write(tmp_path / "tokenizer_config.json", eos_token="</nosuch>")
    with pytest.raises(DataError, match="has no symbol </nosuch>"):
        read(tmp_path)


def test_special_tokens_are_strings_or_objects() -> None:
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "add_bos_token": True}
    assert special_tokens(settings) == {"bos_token": "<s>", "eos_token": "</s>"}


def test_what_ends_a_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    json_file(tmp_path)
    assert read(tmp_path).stop_ids == ()
    write(tmp_path / "config.json", eos_token_id=257)
    assert read(tmp_path).stop_ids == (257,)
    write(tmp_path / "generation_config.json", temperature=0.6)
    assert read(tmp_path).stop_ids == (257,)
    write(tmp_path / "generation_config.json", eos_token_id=[257, 256, 3])
    assert read(tmp_path).stop_ids == (257, 256, 3)
    assert not caplog.records
    write(tmp_path / "generation_config.json", eos_token_id=[257, 50256])
    assert read(tmp_path).stop_ids == (257,)
    assert "eos_token_id=[257, 50256] is not among the tokenizer's 258 ids" in caplog.records[0].getMessage()


@pytest.mark.parametrize("value", ["</s>", 1.5, [1, None], [True], {}])
def test_ends_that_are_no_ids(tmp_path: Path, value: Any) -> None:
    json_file(tmp_path)
    write(tmp_path / "config.json", eos_token_id=value)
    with pytest.raises(DataError, match=r"config\.json: eos_token_id=.* is no token id, nor a list of them"):
        read(tmp_path)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    json_file(tmp_path)
    with pytest.raises(DataError, match="'</s>' is token 257, and the model has 200 rows"):
        read_tokenizer(tmp_path, ModelConfig(vocab=200))


def test_more_symbols_than_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As where a padding symbol was added to the tokenizer alone."""
    json_file(tmp_path, end="<s>")
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["added_tokens"].append(settings["added_tokens"][0] | {"id": 257, "content": "<pad>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    write(tmp_path / "tokenizer_config.json", eos_token="<s>")
    tokenizer, _ = read_tokenizer(tmp_path, ModelConfig(vocab=257))
    assert tokenizer is not None and tokenizer.vocab_size == 258
    assert "the tokenizer has 258 ids and the model 257 rows" in caplog.records[0].getMessage()


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    write(tmp_path / "vocab.json", a=1)  # half a pair is none
    assert read_tokenizer(tmp_path, MODEL) == (None, {})
