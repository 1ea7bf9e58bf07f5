"""llama2.c files: the numbers that its own program computes, vocabularies, and what is refused."""

import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from lmjax.data.tokenizers.load import load_tokenizer
from lmjax.errors import CheckpointError, ConfigError, DataError
from lmjax.hf import llama2c
from lmjax.models import decoder
from lmjax.models.config import ModelConfig, RopeConfig
from lmjax.weights import by_path

pytestmark = pytest.mark.usefixtures("quick_compilation")

# The models in the wild are tied with equal head counts (15M), untied with a large vocabulary, and with shared keys.
SHAPES = {
    "tied": {"dim": 24, "hidden": 40, "layers": 3, "heads": 4, "kv": 4, "vocab": 31, "length": 20, "tied": True},
    "untied": {"dim": 24, "hidden": 36, "layers": 2, "heads": 6, "kv": 2, "vocab": 31, "length": 20, "tied": False},
}


# Files as llama2.c writes them ----------------------------------------------------------------------------------------


def random_weights(dim, hidden, layers, heads, kv, vocab, length, tied) -> dict[str, np.ndarray]:
    """PyTorch's names and shapes, [out, in], in the order of version 0."""
    rng = np.random.default_rng(0)
    head = dim // heads
    shapes = {
        "tok_embeddings": (vocab, dim),
        "attention_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv * head, dim),
        "wv": (layers, kv * head, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
    } | ({} if tied else {"output": (vocab, dim)})
    return {name: rng.normal(size=shape, scale=shape[-1] ** -0.5).astype("<f4") for name, shape in shapes.items()}


def angles(dim, heads, length, **_) -> np.ndarray:
    return np.outer(np.arange(length), 10000.0 ** (-np.arange(0, dim // heads, 2) / (dim // heads)))


def file_of(version: int, weights: dict[str, np.ndarray], **shape: Any) -> bytes:
    sizes = [shape[name] for name in ("dim", "hidden", "layers", "heads", "kv", "vocab", "length")]
    if version == 0:
        sizes[5] *= 1 if shape["tied"] else -1
        tables = {"cos": np.cos(angles(**shape)), "sin": np.sin(angles(**shape))}
        output = {name: weights[name] for name in weights if name == "output"}
        order = {name: weights[name] for name in weights if name != "output"} | tables | output
        return struct.pack("<7i", *sizes) + b"".join(w.astype("<f4").tobytes() for w in order.values())
    norms = ["attention_norm", "ffn_norm", "norm"]
    header = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, shape["tied"]).ljust(256, b"\0")
    return header + b"".join(weights[name].tobytes() for name in [*norms, *(n for n in weights if n not in norms)])


def llama2c_logits(weights, tokens, dim, heads, kv, layers, **shape) -> np.ndarray:
    """The forward pass of run.c in float64: pairs (2i, 2i + 1) of each head turn together."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    length, head = len(tokens), dim // heads
    turn = np.exp(1j * angles(dim=dim, heads=heads, length=length))[:, None]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def rotate(x):
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    x = w["tok_embeddings"][tokens]
    for layer in range(layers):
        h = norm(x, w["attention_norm"][layer])
        q = rotate((h @ w["wq"][layer].T).reshape(length, heads, head))
        k = rotate((h @ w["wk"][layer].T).reshape(length, kv, head)).repeat(heads // kv, axis=1)
        v = (h @ w["wv"][layer].T).reshape(length, kv, head).repeat(heads // kv, axis=1)
        score = np.einsum("tnh,snh->nts", q, k) / np.sqrt(head) + np.triu(np.full((length, length), -np.inf), 1)
        share = np.exp(score - score.max(-1, keepdims=True))
        mixed = np.einsum("nts,snh->tnh", share / share.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(length, dim) @ w["wo"][layer].T
        h = norm(x, w["ffn_norm"][layer])
        gate = h @ w["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][layer].T)) @ w["w2"][layer].T
    return norm(x, w["norm"]) @ w.get("output", w["tok_embeddings"]).T


@pytest.mark.parametrize(("name", "version"), [("tied", 0), ("untied", 1)])
def test_logits_are_those_of_the_program(tmp_path: Path, name: str, version: int) -> None:
    weights, path = random_weights(**SHAPES[name]), tmp_path / "model.bin"
    path.write_bytes(file_of(version, weights, **SHAPES[name]))
    cfg, params = llama2c.read(path)
    tokens = np.random.default_rng(1).integers(0, 31, 20)
    logits = decoder.build(cfg).logits(jax.tree.map(jnp.asarray, params), tokens[None])[0]
    np.testing.assert_allclose(logits, llama2c_logits(weights, tokens, **SHAPES[name]), atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_every_version_reads_the_same_and_writes_what_it_read(tmp_path: Path, name: str) -> None:
    read = []
    for version in (0, 1):
        original, path = file_of(version, random_weights(**SHAPES[name]), **SHAPES[name]), tmp_path / "model.bin"
        path.write_bytes(original)
        cfg, params = llama2c.read(path)
        llama2c.write(tmp_path / "again.bin", cfg, params, version=version)
        assert (tmp_path / "again.bin").read_bytes() == original
        read.append((cfg, by_path(params)))
    (cfg, first), (same, second) = read
    assert cfg == same and cfg.tied == SHAPES[name]["tied"] and first.keys() == second.keys()
    assert all(np.array_equal(first[path], second[path]) for path in first)


def test_a_model_that_the_format_cannot_hold_is_not_written(tmp_path: Path) -> None:
    llama = ModelConfig(vocab=31, embed=24, heads=4, activation="silu", gated=True, norm_epsilon=1e-5, dropout=0.1)
    llama2c._require_llama(llama)
    for change in ({"qk_norm": True}, {"rope": RopeConfig(theta=5e5)}, {"norm_epsilon": 1e-6}, {"head_dim": 8}):
        wrong = ModelConfig(**{field: getattr(llama, field) for field in llama.__dataclass_fields__} | change)
        with pytest.raises(ConfigError, match=f"Llama 2 models alone: model.{next(iter(change))}="):
            llama2c.write(tmp_path / "x.bin", wrong, {})
    assert not (tmp_path / "x.bin").exists()


# What is no model -----------------------------------------------------------------------------------------------------


def test_damaged_files_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    good = file_of(0, random_weights(**SHAPES["untied"]), **SHAPES["untied"])
    huge = struct.pack("<7i", 2**30, 2**30, 2**30, 2**20, 2**20, 2**30, 2**30)
    nan = good[:40] + struct.pack("<f", float("nan")) + good[44:]
    cases = {
        "it has 0 bytes": b"",
        "it has 27 bytes": good[:27],
        r"has 28 bytes, but 39,\d+ by its header": good[:28],
        r"truncated, or not a llama2.c model": good[:-4],
        r"has 39,\d+ bytes, but": good + b"\0",
        "its header says .*'embed': -24": struct.pack("<i", -24) + good[4:],
        "'layers': 0": good[:8] + struct.pack("<i", 0) + good[12:],
        "'vocab': 2147483648": good[:20] + struct.pack("<i", -(2**31)) + good[24:],
        "'heads': 5": good[:12] + struct.pack("<i", 5) + good[16:],
        "its header says .*'embed': 1073741824": huge + bytes(1000),
        "version 2 is not read .* export it again with --version 1": struct.pack("<Ii", 0x616B3432, 2) + bytes(300),
        "embed holds numbers that are not finite": nan,
    }
    path = tmp_path / "model.bin"
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            llama2c.read(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(CheckpointError, match=r"cannot read .*: No such file"):
        llama2c.read(tmp_path / "missing.bin")
    with pytest.raises(CheckpointError, match=r"cannot read .*: Is a directory"):
        llama2c.read(tmp_path)


# The vocabulary -------------------------------------------------------------------------------------------------------

WORDS = "the little girl named Lily played in a big red park with her mum and said: naïve ☃"
TEXTS = [
    "Lily said",
    " leading and trailing ",
    "  two  and   three\n\tline  \n\n",
    "",
    " ",
    "Ünseen 𝔘 漢字\0\u2028",
    "<s> </s> <unk> <0x41> \n<s>\n",
    "1234 the the the" * 30,
]


def llama_model(directory: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model with the settings of Llama's, learned from a few words."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 20),
        model_prefix=str(directory / "llama"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=3,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "llama.model"))


def vocabulary(processor: sentencepiece.SentencePieceProcessor) -> bytes:
    """As llama2.c's tokenizer.py exports it."""
    pieces = [processor.id_to_piece(index).replace("\u2581", " ") for index in range(processor.vocab_size())]
    pieces[1:3] = ["\n<s>\n", "\n</s>\n"]
    encoded = [piece.encode() for piece in pieces]
    return struct.pack("<I", max(map(len, encoded))) + b"".join(
        struct.pack("<fI", processor.get_score(index), len(piece)) + piece for index, piece in enumerate(encoded)
    )


def test_a_vocabulary_encodes_as_the_model_it_was_exported_from(tmp_path: Path) -> None:
    processor = llama_model(tmp_path)
    (tmp_path / "tok.bin").write_bytes(vocabulary(processor))
    from_bin = llama2c.read_tokenizer(tmp_path / "tok.bin", 340)
    from_model = llama2c.read_tokenizer(tmp_path / "llama.model", 340)
    for text in TEXTS:
        assert from_bin.encode(text) == from_model.encode(text) == processor.encode(text)
        assert from_bin.decode(from_bin.encode(text)) == processor.decode(processor.encode(text)) == text
    for tokenizer in (from_bin, from_model):
        assert (tokenizer.begin_id, tokenizer.stop_ids, tokenizer.prefix) == (1, (1, 2), b" ")
        assert tokenizer.decode(tokenizer.encode_symbols("<s> Lily</s>the")) == "Lilythe"
        assert [index for index in tokenizer.encode_symbols("<s> Lily</s>the") if index < 3] == [1, 2]
    # With a space in front that the text does not have, and characters of several bytes.
    ids, starts = from_model.place_symbols("<s> Lily é</s>the é")
    assert (ids[0], starts[0], starts[ids.index(2)], starts[-1]) == (1, 0, 10, 18)
    assert ids == from_model.encode_symbols("<s> Lily é</s>the é") and starts == sorted(starts)
    from_bin.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.begin_id, loaded.stop_ids, loaded.hash) == (1, (1, 2), from_bin.hash)


def test_damaged_vocabularies_are_refused(tmp_path: Path) -> None:
    good, path = vocabulary(llama_model(tmp_path)), tmp_path / "tok.bin"
    cases = {
        "has 0 pieces": b"",
        "truncated": good[:-1],
        "has 339 pieces": good[: -len(struct.pack("<fI", 0, 0)) - 3],
        "more than 340 pieces": good + struct.pack("<fI", 0.0, 1) + b"x",
        "is truncated": good[:4] + struct.pack("<fi", 0.0, 2**31 - 1) + good[12:],
        "is not UTF-8": good[:-1] + b"\xff",
        "not a llama2.c vocabulary": good[:4] + struct.pack("<fi", 0.0, -8) * 400,
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            llama2c.read_tokenizer(path, 340)
        assert "\n" not in str(caught.value)
    path.write_bytes(good)
    with pytest.raises(DataError, match="vocabulary of 512"):
        llama2c.read_tokenizer(path, 512)
    with pytest.raises(DataError, match="340 pieces, but the model has a vocabulary of 512"):
        llama2c.read_tokenizer(tmp_path / "llama.model", 512)
