"""llama2.c's `.bin` files (github.com/karpathy/llama2.c): a Llama's weights, and its vocabulary.

Weights are float32 without names, in an order that the version fixes: 0, the first layout, a header of seven integers;
1, a header of 256 bytes with a magic number. The format has no place for the RoPE base (10,000) nor for the epsilon of
the norms (1e-5). It rotates neighbouring pairs (2i, 2i + 1) of a head, we rotate (i, i + H/2): queries and keys are
permuted on the way, which changes no number.
"""

import dataclasses
import math
import os
import struct
from typing import Any

import numpy as np

from lmjax.data.tokenizers.pieces import SentencePieceTokenizer
from lmjax.errors import CheckpointError, ConfigError, DataError
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.models.position import rope_frequencies
from lmjax.record import files
from lmjax.weights import Params, by_path

_MAGIC = 0x616B3432  # "ak42"
_HEADER_BYTES = {0: 28, 1: 256}
_LAYERS = "segments/0/0/"

# Our weight <- the file's axes -> ours. I counts a head's pairs, P is the place in a pair; I P spell H in the file.
_AXES = {
    "embed": "VD -> VD",
    _LAYERS + "attention_norm/scale": "LD -> LD",
    _LAYERS + "attention/query": "LNIPD -> LDNPI",
    _LAYERS + "attention/key": "LKIPD -> LDKPI",
    _LAYERS + "attention/value": "LKHD -> LDKH",
    _LAYERS + "attention/output": "LDNH -> LNHD",
    _LAYERS + "mlp_norm/scale": "LD -> LD",
    _LAYERS + "mlp/gate": "LFD -> LDF",
    _LAYERS + "mlp/down": "LDF -> LFD",
    _LAYERS + "mlp/up": "LFD -> LDF",
    "final_norm/scale": "D -> D",
    "rotations": "PTI -> PTI",  # cos and sin: in version 0 alone, and not a weight
    "unembed": "VD -> DV",
}
_NORMS = [name for name in _AXES if name.endswith("norm/scale")]
# Settings that change no number that a trained model computes, or are compared by their sizes.
_FREE = ("kv_heads", "head_dim", "attention", "dropout", "attention_dropout", "embed_dropout", "dtype", "remat",
         "unroll", "init_std", "embed_init_std", "residual_init_scale")  # fmt: skip
_ORDER = {0: list(_AXES), 1: _NORMS + [name for name in _AXES if name not in _NORMS and name != "rotations"]}


# Weights ----------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> tuple[ModelConfig, Params]:
    """The model of a .bin file and its weights, float32 numpy arrays as `decoder.weights` declares them.

    The file is mapped, not read: memory is the weights once. Raises CheckpointError for what is no such file, is not
    as long as its header says, is of another version (2 holds int8), or holds numbers that are not finite.
    """
    path = os.fspath(path)
    cfg, version = _read_header(path)
    values = np.memmap(path, "<f4", mode="r", offset=_HEADER_BYTES[version])
    params: Params = {}
    start = 0
    for name in _order(version, cfg):
        old, new = _AXES[name].split(" -> ")
        shape = _shape(old, cfg)
        stored = values[start : start + math.prod(shape)].reshape(shape)
        start += stored.size
        if name != "rotations":
            _put(params, name, np.array(stored.transpose([old.index(axis) for axis in new]), np.float32, order="C"))
    spec = by_path(decoder.weights(cfg))
    for name, weight in by_path(params).items():
        if not np.isfinite(weight).all():
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite; fetch the file again")
        _put(params, name, weight.reshape(spec[name].shape))
    return cfg, params


def write(path: str | os.PathLike[str], cfg: ModelConfig, params: Params, *, version: int = 0) -> None:
    """The inverse of `read`, in version 0 or 1. Raises ConfigError for a model that the format cannot hold."""
    _require_llama(cfg)
    dims = cfg.dims
    vocab = dims["vocab"] if cfg.tied or version == 1 else -dims["vocab"]
    sizes = (dims["embed"], dims["mlp"], cfg.layers, dims["heads"], dims["kv_heads"], vocab, cfg.context)
    with open(path, "wb") as file:
        if version == 0:
            file.write(struct.pack("<7i", *sizes))
        else:
            file.write(struct.pack("<Ii7iB", _MAGIC, version, *sizes, cfg.tied).ljust(_HEADER_BYTES[1], b"\0"))
        weights = by_path(params) | {"rotations": _rotations(cfg)}
        for name in _order(version, cfg):
            old, new = _AXES[name].split(" -> ")
            weight = np.asarray(weights[name], "<f4").reshape(_shape(new, cfg))
            file.write(np.ascontiguousarray(weight.transpose([new.index(axis) for axis in old])).data)


def _read_header(path: str) -> tuple[ModelConfig, int]:
    """The config and version of a file whose size fits its header; nothing is allocated before that is known."""
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER_BYTES[1])
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(header) < _HEADER_BYTES[0]:
        raise CheckpointError(f"{path} is not a llama2.c model: it has {len(header)} bytes")
    version = 0
    if struct.unpack_from("<I", header)[0] == _MAGIC and len(header) == _HEADER_BYTES[1]:
        version, *numbers, tied = struct.unpack_from("<i7iB", header, 4)
        if version != 1:
            raise CheckpointError(
                f"{path}: llama2.c version {version} is not read (2 holds int8); export it again with --version 1"
            )
    else:
        *numbers, signed_vocab, context = struct.unpack_from("<7i", header)
        numbers, tied = [*numbers, abs(signed_vocab), context], signed_vocab > 0
    named = dict(zip(("embed", "mlp", "layers", "heads", "kv_heads", "vocab", "context"), numbers, strict=True))
    try:
        cfg = _config(named, tied=bool(tied))
    except ValueError as error:  # ConfigError, and pydantic's for what is not positive
        raise CheckpointError(f"{path} is not a llama2.c model: its header says {named}") from error
    wanted = _HEADER_BYTES[version] + 4 * sum(
        math.prod(_shape(_AXES[name].split(" -> ")[0], cfg)) for name in _order(version, cfg)
    )
    if size != wanted:
        raise CheckpointError(
            f"{path} has {size:,} bytes, but {wanted:,} by its header {named}: truncated, or not a llama2.c model"
        )
    return cfg, version


def _config(sizes: dict[str, int], *, tied: bool) -> ModelConfig:
    return ModelConfig(**sizes, tied=tied, activation="silu", gated=True, norm_epsilon=1e-5)  # type: ignore[arg-type]


def _require_llama(cfg: ModelConfig) -> None:
    """Raise ConfigError unless reading a file of these sizes gives a model that computes the same."""
    names = ("embed", "mlp", "heads", "kv_heads", "vocab", "context")
    held = _config({name: cfg.dims[name] for name in names} | {"layers": cfg.layers}, tied=cfg.tied)
    wanted = dataclasses.replace(cfg, **{name: getattr(held, name) for name in _FREE})
    differing = [
        field.name for field in dataclasses.fields(cfg) if getattr(wanted, field.name) != getattr(held, field.name)
    ]
    if cfg.dims["head_dim"] != held.dims["head_dim"]:
        differing.append("head_dim")
    if differing:
        name = differing[0]
        raise ConfigError(
            f"llama2.c holds Llama 2 models alone: model.{name}={getattr(cfg, name)!r}, not {getattr(held, name)!r}"
        )


def _order(version: int, cfg: ModelConfig) -> list[str]:
    return [name for name in _ORDER[version] if not (cfg.tied and name == "unembed")]


def _shape(axes: str, cfg: ModelConfig) -> tuple[int, ...]:
    dims = cfg.dims
    sizes = {
        "V": dims["vocab"],
        "D": dims["embed"],
        "L": cfg.layers,
        "N": dims["heads"],
        "K": dims["kv_heads"],
        "H": dims["head_dim"],
        "I": dims["head_dim"] // 2,
        "P": 2,
        "F": dims["mlp"],
        "T": cfg.context,
    }
    return tuple(sizes[axis] for axis in axes)


def _rotations(cfg: ModelConfig) -> np.ndarray:
    """cos and sin of the rotary angles, [2, T, H/2]."""
    angles = np.arange(cfg.context)[:, None] * rope_frequencies(cfg.rope, cfg.dims["head_dim"], local=False)
    return np.stack([np.cos(angles), np.sin(angles)])


def _put(params: Params, path: str, value: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        params = params.setdefault(parent, {})
    params[name] = value


# The vocabulary ---------------------------------------------------------------------------------------------------

_SYMBOLS = {0: "<unk>", 1: "<s>", 2: "</s>"}
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # SentencePiece's types of pieces


def read_tokenizer(path: str | os.PathLike[str], vocab: int) -> SentencePieceTokenizer:
    """The tokenizer of a model: llama2.c's .bin vocabulary, or the SentencePiece .model that one is made from.

    Documents follow one another after `<s>`, which is therefore endoftext; `</s>` ends a text, too. Raises DataError
    for a file that is damaged or has not `vocab` pieces.
    """
    located = files.locate(path)
    content = files.read_bytes(located)
    model = content if located.suffix == ".model" else sentencepiece_model(content, vocab, str(located))
    tokenizer = SentencePieceTokenizer(model, "<s>", str(located))
    if tokenizer.vocab_size != vocab:
        raise DataError(f"{located} has {tokenizer.vocab_size} pieces, but the model has a vocabulary of {vocab}")
    tokenizer.begin_id = tokenizer.endoftext_id
    end = tokenizer.symbol_id("</s>")
    tokenizer.stop_ids = (tokenizer.begin_id,) if end is None else (tokenizer.begin_id, end)
    return tokenizer


def sentencepiece_model(content: bytes, vocab: int, name: str = "tokenizer.bin") -> bytes:
    """The SentencePiece model that a llama2.c vocabulary was exported from, as far as encoding and decoding go.

    The file holds (score, length, text) of every piece. Llama's models are byte-pair merges in the order of scores,
    with bytes for unknown characters, a space put in front, and text otherwise as it is: so is the one returned.
    Raises DataError for what is not such a file of `vocab` pieces.
    """
    pieces: list[bytes] = []
    start = 4  # after the length of the longest piece
    while start < len(content):
        if start + 8 > len(content):
            raise DataError(f"{name} is truncated, or not a llama2.c vocabulary")
        score, length = struct.unpack_from("<fi", content, start)
        start += 8 + length
        if length < 0 or start > len(content) or len(pieces) == vocab:
            raise DataError(f"{name} is truncated, has more than {vocab} pieces, or is not a llama2.c vocabulary")
        pieces.append(_piece(len(pieces), content[start - length : start], score, name))
    if len(pieces) != vocab:
        raise DataError(f"{name} has {len(pieces)} pieces, but the model has a vocabulary of {vocab}")
    trainer = _varint(3, 2) + _varint(35, 1)  # model_type BPE, byte_fallback
    normalizer = _bytes(1, b"identity") + _varint(3, 1) + _varint(4, 0) + _varint(5, 1)
    return b"".join(_bytes(1, piece) for piece in pieces) + _bytes(2, trainer) + _bytes(3, normalizer)


def _piece(index: int, text: bytes, score: float, name: str) -> bytes:
    """A SentencePiece message: text 1, score 2, type 3."""
    try:
        symbol = _SYMBOLS.get(index) or text.decode("utf-8").replace(" ", "\u2581")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: piece {index} is not UTF-8") from error
    if index in _SYMBOLS:
        kind = _UNKNOWN if index == 0 else _CONTROL
    else:
        kind = _BYTE if symbol == f"<0x{index - 3:02X}>" else _NORMAL
    return _bytes(1, symbol.encode()) + _tag(2, 5) + struct.pack("<f", score) + _varint(3, kind)


# Protocol buffers: a field is its number and wire type, then the value.


def _tag(field: int, wire: int) -> bytes:
    return _base128(field << 3 | wire)


def _varint(field: int, value: int) -> bytes:
    return _tag(field, 0) + _base128(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _tag(field, 2) + _base128(len(value)) + value


def _base128(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the eighth bit set."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _base128(rest) if rest else bytes([low])
