"""Tokenizers: lossless where they can be, honest where they cannot, and exact on references."""

import functools
import io
import itertools
import json
import re
import shutil
import sys
import unicodedata

import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings

from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.prepare.corpus import validation_documents
from lmjax.data.prepare.prepare import prepare
from lmjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from lmjax.data.tokenizers.load import load_tokenizer, saved_hash, train_tokenizer
from lmjax.data.tokenizers.pieces import SentencePieceTokenizer
from lmjax.data.tokenizers.sections import SECTION_CHARS, sections
from lmjax.data.tokenizers.tokenizer import ENDOFTEXT
from lmjax.data.tokenizers.words import Words, crosses_words
from lmjax.errors import DataError

CODE = 'def f(x):\n\tif x:\n        return "<a> " + x\n\n\nclass A:\n    pass  # ▁ über\n'
TRAINED = ("bpe", "unigram")
LEARNED = (*TRAINED, "wordpiece")

any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def learned(request):
    """learned(kind): a tokenizer of 600 tokens, trained on code and words."""
    from lmjax.data.tokenizers import tokenizer as module

    texts = [CODE * 20, *(f"{word} {word}s the {word}ing of a {word}er\n" * 3 for word in dir(module) + dir(np))]
    return lambda kind: train_tokenizer(TokenizerConfig(kind=kind, vocab=600), texts)


@pytest.fixture(scope="module", params=[*LEARNED, "bytes"])
def tokenizer(request, learned):
    kind = request.param
    return learned(kind) if kind in LEARNED else train_tokenizer(TokenizerConfig(kind=kind), [])


@settings(max_examples=300, deadline=None)
@given(text=any_text)
@example(text=ENDOFTEXT)
@example(text=f"a {ENDOFTEXT}{ENDOFTEXT}> \u2581\u2581{ENDOFTEXT[:-1]}")
@example(text="\u2581 a\u2581")
@example(text="  two leading, two trailing  ")
@example(text="\0\0a\0")
@example(text="\r\n\r\t\v\f\x85\u2028 \u3000\u200b\ufeff\ufffe\uffff")
@example(text="\u0301alone e\u0301 \u2047 \u2585 <unk> <s> <0x41> <|endoftext")
@example(text="𝔘👩‍👩‍👧‍👦🇩🇪\U0010ffff")
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.endoftext_id not in ids and all(0 <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.decode([*ids, tokenizer.endoftext_id]) == text


def test_text_of_another_script_comes_back(tokenizer, persian):
    for text in persian:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_every_code_point_comes_back(tokenizer):
    for start in range(0, 0x110000, 0x1000):
        text = " ".join(chr(code) for code in range(start, start + 0x1000) if unicodedata.category(chr(code)) != "Cs")
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_stream_of_tokens_decodes_to_the_same_bytes(tokenizer):
    text = "naïve ☃ 𝔘\n\tend"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.decode_bytes([index]) for index in ids) == text.encode()
    assert "\ufffd" in "".join(tokenizer.decode([index]) for index in tokenizer.encode("☃𝔘"))


def test_saved_and_loaded_is_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.hash == tokenizer.hash == saved_hash(tmp_path)
    assert loaded.encode(CODE) == tokenizer.encode(CODE)
    assert [loaded.encode(CODE), loaded.encode("")] == [tokenizer.encode(CODE), []]


def test_what_is_not_text_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"unpaired surrogate U\+D835 at character 1"):
        tokenizer.encode("a\ud835")
    with pytest.raises(DataError, match=f"{tokenizer.vocab_size + 5} is outside the tokenizer's vocabulary"):
        tokenizer.decode_bytes([0, tokenizer.vocab_size + 5])


@pytest.mark.parametrize("kind", LEARNED)
def test_training_again_gives_the_same_bits(learned, kind):
    assert learned(kind).content() == learned(kind).content()


@pytest.mark.parametrize("kind", LEARNED)
def test_only_what_is_trained_on_is_learned_from(kind, tmp_path):
    """Other documents for validation change nothing, and other ones for training do."""
    hashes = []
    drawn = {*itertools.takewhile(lambda number: number < 60, validation_documents(0, 0.05))}
    for valid, train in (("one", "two"), ("three", "two"), ("one", "four")):
        names = [valid if number in drawn else train for number in range(60)]
        texts = [f"{name} text of {n * 37} " + " ".join(dir(np)[n : n + 9]) for n, name in enumerate(names)]
        source = tmp_path / f"{valid}-{train}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        cfg = PrepareConfig(inputs=(str(source),), tokenizer=TokenizerConfig(kind=kind, vocab=560), workers=1)
        hashes.append(prepare(cfg, tmp_path / f"{valid}-{train}", progress=False).tokenizer_hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_bpe_writes_code_compactly_and_lines_apart(learned):
    tokenizer = learned("bpe")
    assert len(tokenizer.encode(" " * 64)) <= 16
    assert len(tokenizer.encode("a\n\tb")) == 4
    table = [tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size)]
    assert not any(b"\n" in piece and len(piece) > 1 for piece in table)
    assert tokenizer.vocab_size == 600


@given(lines=st.lists(st.sampled_from(["", "word", " " * 9, "\tx y", "a" * 50, "é "]), max_size=60), end=st.booleans())
def test_sections_join_to_the_text_and_cut_between_words(lines, end):
    text = ("\n" if end else " ").join(lines)
    parts = list(sections(text, 20))
    assert "".join(parts) == text
    assert all(20 <= len(part) <= 40 for part in parts[:-1])


@pytest.mark.parametrize("kind", TRAINED)
def test_long_texts_have_the_tokens_that_the_library_gives(learned, kind, reference):
    tokenizer = learned(kind)
    text = (reference / "tinyshakespeare" / "input.txt").read_text()[: 5 * SECTION_CHARS]
    assert tokenizer.encode(text) == tokenizer.processor.encode(text)
    one_line = text.replace("\n", " ")
    assert tokenizer.encode(one_line) == tokenizer.processor.encode(one_line)


WORDS = ["\n", "\t", " ", "    ", "def", "self", "é", "。漢", "\r", "\xa0", "):", "\0"]


@pytest.mark.parametrize("kind", TRAINED)
@given(text=st.one_of(any_text, st.lists(st.sampled_from(WORDS)).map("".join)))
def test_tokens_in_an_array_are_those_of_the_library(learned, kind, text):
    tokenizer = learned(kind)
    text = text.replace("\u2581", "")
    assert tokenizer.encode(text) == tokenizer.processor.encode(text)
    tokens, exact = tokenizer.tokens(text, np.uint16)
    assert tokens.tolist() == [*tokenizer.encode(text), tokenizer.endoftext_id] and exact


def test_pieces_that_cross_words():
    assert not any(map(crosses_words, ["word", "  word", "   ", "\n", "\t", "):"]))
    assert all(map(crosses_words, ["a b", "a ", " \n", "\n\n", "\tx", "a\n"]))


def test_a_word_is_encoded_once(monkeypatch):
    asked = []
    pieces = [b"a", b"b", b"c", b" "]
    words = Words(lambda word: asked.append(word) or ["abc ".find(letter) % 4 for letter in word], pieces)
    tokens, exact = words.encode("ab ab c ab")
    assert tokens.tolist() == [0, 1, 3, 0, 1, 3, 2, 3, 0, 1] and exact
    assert words.encode(" c")[0].tolist() == [3, 2] and asked == ["ab", " ab", " c"]
    monkeypatch.setattr("lmjax.data.tokenizers.words._ROOM", 0)
    assert words.encode(" c")[0].tolist() == [3, 2] and asked[3:] == [" c"]  # there was no room for more
    assert not words.encode("a d")[1] and not words.encode(" d")[1]  # what is not known becomes a space
    assert words.encode(" c")[1] and words.encode("")[0].tolist() == []


def test_only_byte_pairs_that_rewrite_nothing_are_taken_by_words(learned):
    texts = ["a\r\nb", "\x0b\n", "\x1f", "\n\n\n", "ab c x", " \n", "if x :\n", CODE.replace("\u2581", "")]
    kinds = {"plain": {}, "rewriting": {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["\n", "\t"]}}
    kinds |= {"unigram": {"model_type": "unigram"}, "crossing": {"user_defined_symbols": ["b c", "\n\n"]}}
    for kind, special in kinds.items():
        found = SentencePieceTokenizer(sentencepiece_model(**special))
        assert (found._words is not None) == (kind == "plain")
        for text in texts:
            ids = found.processor.encode(text)
            assert found.encode(text) == ids
            tokens, exact = found.tokens(text, np.uint16)
            assert tokens.tolist() == [*ids, found.endoftext_id] and exact == (found.decode(ids) == text)
    with pytest.raises((OverflowError, TypeError)):
        learned("bpe").tokens(CODE, np.uint8)


def sentencepiece_model(**special):
    """Bytes for what it does not know, and no normalization but what is asked for."""
    model = io.BytesIO()
    lossless = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    lossless |= {"byte_fallback": True, "allow_whitespace_only_pieces": True, "model_type": "bpe", "minloglevel": 3}
    lines = iter([*CODE.split("\n"), *dir(np)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=400, **lossless | special
    )
    return model.getvalue()


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("end", ["\u241e", "\n"])
def test_an_end_of_text_of_one_character_is_spelled_in_bytes(kind, end):
    found = SentencePieceTokenizer(sentencepiece_model(model_type=kind, user_defined_symbols=[end]), end)
    for text in (f"a{end}b", end, f"{end}{end} c"):
        ids = found.encode(text)
        assert found.endoftext_id not in ids and found.decode(ids) == text
        tokens, exact = found.tokens(text, np.uint16)
        assert tokens.tolist() == [*ids, found.endoftext_id] and exact


@pytest.mark.parametrize("kind", TRAINED)
def test_text_that_becomes_the_end_of_text_is_refused(kind):
    special = {"normalization_rule_name": "nfkc_cf", "user_defined_symbols": ["<|endoftext|>", "\n", "\t"]}
    found = SentencePieceTokenizer(sentencepiece_model(model_type=kind, **special))
    assert found.endoftext_id not in found.encode("a <|endoftext|> b")
    for encode in (found.encode, lambda text: found.tokens(text, np.uint16)):
        with pytest.raises(DataError, match="in what this text becomes"):
            encode("a <|ENDOFTEXT|> b")


def test_no_code_that_protobuf_generates_is_needed(learned, monkeypatch):
    """It works with few versions of the protobuf library."""
    models = [learned(kind).content() for kind in TRAINED] + [sentencepiece_model(add_dummy_prefix=True)]
    for name in ("google.protobuf", "sentencepiece.sentencepiece_model_pb2", "sentencepiece.sentencepiece_pb2"):
        monkeypatch.setitem(sys.modules, name, None)
    for model in models:
        found = SentencePieceTokenizer(model, "</s>" if model is models[-1] else None)
        ids, starts = found.place_symbols("def f(x):")
        assert ids == found.encode("def f(x):") == found.tokens("def f(x):", np.uint16)[0].tolist()[:-1]
        assert starts[0] == 0 and len(starts) == len(ids)


@pytest.fixture(scope="module")
def wordpiece(learned):
    pytest.importorskip("tokenizers")
    return learned("wordpiece")


def test_wordpiece_cuts_words_into_the_longest_pieces(wordpiece):
    """From their beginnings on, written out; words as GPT-2 cuts them, # apart."""
    vocabulary = {wordpiece._tokenizer.id_to_token(index) for index in range(wordpiece.vocab_size)}
    words = re.compile(r" ?[a-z]+| ?[0-9]+|\s+(?!\S)|\s+|#| ?[^\sa-z0-9#]+")
    text = "the wording of a number # and ## of arrays;  its 12 dimensions"
    expected = []
    for word in words.findall(text):
        spelled, at = word.replace(" ", "Ġ"), 0
        while at < len(spelled):
            ends = [end for end in range(len(spelled), at, -1) if "##" * bool(at) + spelled[at:end] in vocabulary]
            expected.append("##" * bool(at) + spelled[at : ends[0]])
            at = ends[0]
    assert [wordpiece._tokenizer.id_to_token(index) for index in wordpiece.encode(text)] == expected
    assert any(len(piece) > 4 and piece.startswith("##") for piece in vocabulary)


def test_wordpiece_takes_no_text_for_its_marks(wordpiece):
    for text in ("## ### #### a##b ##a [UNK] <|endoftext|>##", "x" * 500, "#" * 500, "\u0120\u010a", "Ġ##Ċ"):
        ids = wordpiece.encode(text)
        assert wordpiece.decode(ids) == text and not {wordpiece.unknown_id, wordpiece.endoftext_id} & set(ids)


def test_wordpiece_on_long_texts_is_what_the_library_gives(wordpiece, reference):
    text = (reference / "tinyshakespeare" / "input.txt").read_text()[: 5 * SECTION_CHARS]
    assert wordpiece.encode(text) == wordpiece._tokenizer.encode(text).ids


def test_wordpiece_is_what_transformers_makes_of_its_file(wordpiece, tmp_path):
    transformers = pytest.importorskip("transformers")
    wordpiece.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = theirs.encode(CODE, add_special_tokens=False)
    assert ids == wordpiece.encode(CODE) and theirs.decode(ids) == CODE == wordpiece.decode(ids)


def test_berts_words_have_blanks_between_them():
    """As the library's own decoder says, which also spells what a stream of tokens is."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordPiece(
        {"[UNK]": 0, "[SEP]": 1, "play": 2, "##ing": 3, "chess": 4, "a": 5}, unk_token="[UNK]"
    )
    bert = tokenizers.Tokenizer(model)
    bert.pre_tokenizer, bert.decoder = tokenizers.pre_tokenizers.BertPreTokenizer(), tokenizers.decoders.WordPiece()
    tokenizer = HuggingFaceTokenizer(bert.to_str().encode(), "[SEP]")
    ids = tokenizer.encode("playing chess")
    assert ids == [2, 3, 4] and tokenizer.decode(ids) == "playing chess"
    assert tokenizer.decode_bytes(ids) == b" playing chess" and tokenizer.prefix == b" "


def test_impossible_vocabularies_say_what_is_possible():
    texts = ["a few words of text and a few more"] * 5
    with pytest.raises(DataError, match=r"tokenizer.vocab=9999 is more than this text can give: at most \d+"):
        train_tokenizer(TokenizerConfig(vocab=9999), texts)
    with pytest.raises(DataError, match=r"tokenizer.vocab=100 is too small .*: at least \d+"):
        train_tokenizer(TokenizerConfig(vocab=100), texts)
    with pytest.raises(DataError, match="documents are empty"):
        train_tokenizer(TokenizerConfig(vocab=300), [""])
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match=r"tokenizer.vocab=9999 is more than this text can give: at most \d+"):
        train_tokenizer(TokenizerConfig(kind="wordpiece", vocab=9999), texts)
    with pytest.raises(DataError, match=r"tokenizer.vocab=100 is too small .*: at least 513"):
        train_tokenizer(TokenizerConfig(kind="wordpiece", vocab=100), texts)
    with pytest.raises(DataError, match="documents are empty"):
        train_tokenizer(TokenizerConfig(kind="wordpiece", vocab=600), [""])


def test_configs_that_contradict_themselves():
    with pytest.raises(ValueError, match="path"):
        TokenizerConfig(kind="file")
    with pytest.raises(ValueError, match="path"):
        TokenizerConfig(kind="bpe", path="x.model")


# Characters -----------------------------------------------------------------------------------------------------------


def test_characters_are_numbered_as_nanogpt_does(reference):
    text = (reference / "tinyshakespeare" / "input.txt").read_text()
    tokenizer = train_tokenizer(TokenizerConfig(kind="chars"), [text])
    ids = {character: index for index, character in enumerate(sorted(set(text)))}
    assert len(ids) == 65 == tokenizer.endoftext_id and tokenizer.vocab_size == 66
    assert tokenizer.encode(text) == [ids[character] for character in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(DataError, match="character 'é' is not in the tokenizer's alphabet of 65"):
        tokenizer.encode("café")


@given(text=any_text)
def test_characters_come_back(text):
    tokenizer = train_tokenizer(TokenizerConfig(kind="chars"), [text + "x"])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert load_content(tokenizer).encode(text) == tokenizer.encode(text)


def load_content(tokenizer):
    from lmjax.data.tokenizers.alphabets import CharacterTokenizer

    return CharacterTokenizer.from_content(tokenizer.content(), "alphabet.json")


# Given models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sp_test_model.model", "t5_cc_all.32000.100extra.model"])
def test_given_learneds_are_run_exactly(reference, name):
    import sentencepiece

    path = reference / "tokenizers" / name
    tokenizer = load_tokenizer(path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    lines = (reference / "tokenizers" / "botchan.txt").read_text().splitlines()[:1000]
    for line in [*lines, " ".join(lines)]:
        expected = library.encode(line)
        if library.unk_id() in expected:
            with pytest.raises(DataError, match="is unknown to the tokenizer"):
                tokenizer.encode(line)
        else:
            assert tokenizer.encode(line) == expected
            assert tokenizer.decode(expected) == library.decode(expected)
    assert tokenizer.vocab_size == library.vocab_size() and tokenizer.endoftext == "</s>"


def test_a_model_without_the_letters_refuses_to_emit_unknown(reference, persian):
    tokenizer = load_tokenizer(reference / "tokenizers" / "t5_cc_all.32000.100extra.model")
    with pytest.raises(DataError, match=r"character '.' is unknown to the tokenizer"):
        tokenizer.encode(persian[0])


BYTE_LEVEL = {"gpt2": ("gpt2_vocab.json", "gpt2_merges.txt")} | {
    "trainer": ("train-bpe-reference-vocab.json", "train-bpe-reference-merges.txt")
}


@pytest.fixture(scope="module")
def byte_level_file(reference, tmp_path_factory):
    """byte_level_file(name): a vocabulary and merges of BYTE_LEVEL as a tokenizer.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    def build(name):
        vocabulary, merges = (reference / "tokenizers" / "gpt2_and_bpe_reference" / file for file in BYTE_LEVEL[name])
        pairs = [tuple(line.split(" ")) for line in merges.read_text().splitlines()]
        pairs = [pair for pair in pairs if len(pair) == 2]
        model = tokenizers.Tokenizer(models.BPE(json.loads(vocabulary.read_text()), pairs))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        model.add_special_tokens([ENDOFTEXT])
        model.enable_truncation(8)
        path = tmp_path_factory.mktemp(name) / "tokenizer.json"
        model.save(str(path))
        return path, json.loads(vocabulary.read_text()), {pair: rank for rank, pair in enumerate(pairs)}

    return functools.cache(build)


@pytest.fixture(scope="module")
def gpt2(byte_level_file):
    return byte_level_file("gpt2")[0]


@pytest.fixture(scope="module")
def gpt2_tokenizer(gpt2):
    return load_tokenizer(gpt2)


def merge_greedily(word, ranks):
    """Byte-pair encoding as it is defined: merge the pair of lowest rank until there is none."""
    parts = list(word)
    while pairs := [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]:
        _, place = min(pairs)
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
    return parts


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_references_are_exact(byte_level_file, reference, name):
    path, vocabulary, ranks = byte_level_file(name)
    tokenizer = load_tokenizer(path)
    text = (reference / "tokenizers" / "gpt2_and_bpe_reference" / "corpus.en").read_text()[:20_000]
    words = re.findall(r" ?[a-zA-Z]+", text)
    expected = [[vocabulary[part] for part in merge_greedily(word.replace(" ", "\u0120"), ranks)] for word in words]
    assert [tokenizer.encode(word) for word in words] == expected
    assert tokenizer.endoftext_id == vocabulary[ENDOFTEXT] and tokenizer.vocab_size == len(vocabulary)


def test_gpt2_is_lossless(gpt2_tokenizer, reference, persian):
    assert gpt2_tokenizer.vocab_size == 50257 and gpt2_tokenizer.endoftext_id == 50256
    assert gpt2_tokenizer.encode("Hello world") == [15496, 995]
    folder = reference / "tokenizers" / "gpt2_and_bpe_reference"
    texts = [path.read_text() for path in folder.glob("*.txt") if path.name != "gpt2_merges.txt"]
    for text in [*texts, *persian, CODE, "\u2581 \0 \ufeff"]:
        ids = gpt2_tokenizer.encode(text)
        assert gpt2_tokenizer.decode(ids) == text and gpt2_tokenizer.decode_bytes(ids) == text.encode()


def test_gpt2_reads_no_special_token_out_of_text(gpt2):
    tokenizer = load_tokenizer(gpt2)
    ids = tokenizer.encode(f"a{ENDOFTEXT}b")
    assert tokenizer.endoftext_id not in ids and tokenizer.decode(ids) == f"a{ENDOFTEXT}b"


def test_gpt2_on_long_texts_is_what_the_library_gives(gpt2, reference):
    import tokenizers

    tokenizer = load_tokenizer(gpt2)
    library = tokenizers.Tokenizer.from_file(str(gpt2))
    library.no_truncation()
    text = (reference / "tokenizers" / "botchan.txt").read_text()
    for variant in (text, text.replace("\n", " "), text.replace("\n", "\r\n\n  ")):
        assert tokenizer.encode(variant) == library.encode(variant, add_special_tokens=False).ids


@settings(max_examples=100, deadline=None)
@given(text=any_text)
def test_gpt2_brings_any_text_back(gpt2_tokenizer, text):
    assert gpt2_tokenizer.decode(gpt2_tokenizer.encode(text)) == text


def test_foreign_files_name_their_end_of_text(gpt2, reference, tmp_path):
    assert load_tokenizer(gpt2, "Hello").endoftext_id == 15496
    with pytest.raises(DataError, match="has no symbol <nope>; name its end of text"):
        load_tokenizer(gpt2, "<nope>")
    model = reference / "tokenizers" / "sp_test_model.model"
    with pytest.raises(DataError, match="has no symbol <nope>"):
        load_tokenizer(model, "<nope>")
    shutil.copy(model, tmp_path / "tokenizer.model")  # a folder as other libraries save it
    assert load_tokenizer(tmp_path).hash == load_tokenizer(model).hash != load_tokenizer(model, "<s>").hash


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_damaged_files_are_named(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(DataError, match=r"does not exist; check tokenizer.path"):
        load_tokenizer(path)
    with pytest.raises(DataError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    for content in (b"", b"garbage", b'{"a": 1}', b"\xff\xfe", b"[" * 10_000):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            load_tokenizer(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_saved_tokenizer_is_noticed(tmp_path):
    train_tokenizer(TokenizerConfig(kind="chars"), ["abc"]).save(tmp_path)
    (tmp_path / "alphabet.json").write_text('"abcd"')
    with pytest.raises(DataError, match="is not what its"):
        load_tokenizer(tmp_path)
    for content in ("", "{}", '{"kind": "magic", "endoftext": "x"}', "[]"):
        (tmp_path / "tokenizer.description.json").write_text(content)
        with pytest.raises(DataError, match="is damaged"):
            load_tokenizer(tmp_path)


PLACED = ["plain words", "a\n\tb  c", "é 日本 x", " leading", "<|endoftext|>a<|endoftext|> é", "a" * 40]


def assert_placed(tokenizer, text):
    """Each token stands for the text from where it begins to where the next one does."""
    ids, starts = tokenizer.place_symbols(text)
    assert ids == tokenizer.encode_symbols(text) and len(ids) == len(starts) and starts == sorted(starts)
    names = {index: symbol for symbol, index in tokenizer.symbol_ids.items()}
    at = 0
    for index, start, end in zip(ids, starts, [*starts[1:], len(text)], strict=True):
        at += len(names[index].encode() if index in names else tokenizer.decode_bytes([index]))
        assert start <= len(text) and end >= start
        if end > start:
            assert len(text[:end].encode()) == at, (text, ids, starts)


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe", "unigram"])
def test_tokens_of_ours_have_their_places(kind):
    texts = [*PLACED, "some more words to learn from " * 20]
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab=285), texts)
    for text in PLACED:
        assert_placed(tokenizer, text)
        if tokenizer.endoftext not in text:
            assert tokenizer.encode_symbols(text) == tokenizer.encode(text)
    found = tokenizer.encode_symbols(PLACED[4])
    assert [found[0], found.count(tokenizer.endoftext_id)] == [tokenizer.endoftext_id, 2]
    assert tokenizer.endoftext_id not in tokenizer.encode(PLACED[4])
