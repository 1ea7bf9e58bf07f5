"""Tokenizers as tokenizer.json, which transformers and we run: those of this project, and GPT-2's pair of files.

Ours have the same ids for the same text, with two exceptions: text that spells endoftext becomes that symbol there, and
a character that an alphabet lacks is left out there instead of being refused.
"""

import json
from collections.abc import Mapping
from typing import Any

from lmjax.data.chat.templates import special_tokens
from lmjax.data.tokenizers.huggingface import byte_of_character
from lmjax.data.tokenizers.tokenizer import ENDOFTEXT, Tokenizer
from lmjax.errors import DataError

_PROBE = "  a  b\n\tc  "  # what SentencePiece models that normalize do not keep
_MARKER = "\u2581"


def as_json(tokenizer: Tokenizer) -> bytes | None:
    """The file, or None for a SentencePiece model that changes white space, which transformers reads as it is."""
    try:
        import tokenizers
    except ImportError:
        raise DataError("tokenizer.json files need an extra; install lmjax[hf]") from None
    if tokenizer.kind == "huggingface":
        return tokenizer.content()
    if tokenizer.kind == "sentencepiece" and tokenizer.decode(tokenizer.encode(_PROBE)) != _PROBE:
        return None
    build = {"bytes": _of_bytes, "chars": _of_characters, "sentencepiece": _of_pieces}[tokenizer.kind]
    built = build(tokenizer, tokenizers)
    built.add_special_tokens([tokenizers.AddedToken(tokenizer.endoftext, special=True, normalized=False)])
    assert built.token_to_id(tokenizer.endoftext) == tokenizer.endoftext_id
    return built.to_str(pretty=True).encode()


def _of_bytes(tokenizer: Tokenizer, tokenizers: Any) -> Any:
    built = tokenizers.Tokenizer(tokenizers.models.BPE(byte_of_character(), []))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    return built


def _of_characters(tokenizer: Tokenizer, tokenizers: Any) -> Any:
    ids = [index for index in range(tokenizer.vocab_size) if index != tokenizer.endoftext_id]
    built = tokenizers.Tokenizer(tokenizers.models.BPE({tokenizer.decode([index]): index for index in ids}, []))
    built.decoder = tokenizers.decoders.Fuse()
    return built


def _of_pieces(tokenizer: Tokenizer, tokenizers: Any) -> Any:
    """A model trained here: spaces as markers, bytes for what no piece covers."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content())
    pieces = [(model.id_to_piece(index), model.get_score(index)) for index in range(model.vocab_size())]
    special = {index for index in range(len(pieces)) if model.is_byte(index) or model.is_unknown(index)}
    if _is_bpe(pieces, special):
        merges = _merges({piece: score for i, (piece, score) in enumerate(pieces) if i not in special})
        vocab = {piece: index for index, (piece, _) in enumerate(pieces)}
        unknown = model.id_to_piece(model.unk_id())
        built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token=unknown, byte_fallback=True))
    else:
        built = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=model.unk_id(), byte_fallback=True))
    built.normalizer = tokenizers.normalizers.Replace(" ", _MARKER)
    spaces = tokenizers.decoders.Replace(_MARKER, " ")
    built.decoder = tokenizers.decoders.Sequence(
        [spaces, tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    return built


def _is_bpe(pieces: list[tuple[str, float]], special: set[int]) -> bool:
    """The trainer scores a BPE piece with its rank, 0, -1, -2, ..., and a unigram piece with a log-probability."""
    return all(float(score).is_integer() for i, (_, score) in enumerate(pieces) if i not in special)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best piece first."""
    ranked = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece])
    cuts = ((piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in scores and right in scores]


# GPT-2's files ----------------------------------------------------------------------------------------------------

# The classes of transformers that such files are for, and where each cuts a text before it merges bytes.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: dict[str, str | None] = {"GPT2Tokenizer": None, "Qwen2Tokenizer": _QWEN}  # None: the library's own pattern


def from_merges(vocab: bytes, merges: bytes, settings: Mapping[str, Any], where: str) -> bytes:
    """The tokenizer.json of a directory that has vocab.json and merges.txt, with its tokenizer_config.json.

    Raises DataError for files that are damaged, and for a tokenizer_class that cuts texts in some other way.
    """
    try:
        import tokenizers
    except ImportError:
        raise DataError("tokenizers need an extra; install lmjax[hf]") from None
    kind = str(settings.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind not in _CUTS:
        raise DataError(f"{where}: vocab.json and merges.txt of a {kind} are not read; save it as tokenizer.json")
    try:
        built = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(vocab), _pairs(merges)))
        built.add_tokens(_added(settings, built, tokenizers))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{where}: vocab.json and merges.txt are damaged ({str(error)[:100]})") from None
    prefix = bool(settings.get("add_prefix_space"))
    cuts: list[Any] = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=_CUTS[kind] is None)]
    if (pattern := _CUTS[kind]) is not None:
        cuts.insert(0, tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
        built.normalizer = tokenizers.normalizers.NFC()
    built.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(cuts)
    built.decoder = tokenizers.decoders.ByteLevel()
    return built.to_str().encode()


def _pairs(merges: bytes) -> list[tuple[str, str]]:
    lines = merges.decode("utf-8").split("\n")
    pairs = (line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version"))
    return [(left, right) for left, right in pairs]


def _added(settings: Mapping[str, Any], built: Any, tokenizers: Any) -> list[Any]:
    """Symbols that are no merges: those listed beside the vocabulary, by their ids, and those that have a role."""
    listed = sorted((int(index), one) for index, one in settings.get("added_tokens_decoder", {}).items())
    symbols = {one["content"]: bool(one["special"]) for _, one in listed}
    roles = [ENDOFTEXT, *special_tokens(settings).values()]
    symbols |= {symbol: True for symbol in roles if built.token_to_id(symbol) is not None}
    return [tokenizers.AddedToken(symbol, special=special, normalized=False) for symbol, special in symbols.items()]
