"""SentencePiece: models trained here, which are lossless, and models given as a file."""

import functools
import io
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lmjax.data.config import TokenizerConfig
from lmjax.data.tokenizers.protobuf import submessages
from lmjax.data.tokenizers.sections import sections
from lmjax.data.tokenizers.tokenizer import (
    ENDOFTEXT,
    NAME_ENDOFTEXT,
    NO_TEXT,
    Tokenizer,
    bytes_of,
    bytes_table,
)
from lmjax.data.tokenizers.words import Words, crosses_words
from lmjax.errors import DataError

_MARKER = "\u2581"  # SentencePiece writes a space as this character, so the character itself needs care
# Of sentencepiece_model.proto: fields of the model, of its trainer_spec and of its normalizer_spec.
_TRAINER, _NORMALIZER, _MODEL_TYPE, _BPE, _CHARACTERS = 2, 3, 3, 2, 2
_CUSTOMARY_ENDS = (ENDOFTEXT, "<|end_of_text|>", "</s>", "<eos>")
# Leading, doubled and trailing spaces, newline and tab: what normalizing models do not keep.
_PROBE = "  a  b\n\tc  "
_NOT_LEARNED = {0: " ", 0x2581: " ", 0x2585: " "}  # the trainer would leave out lines that hold one of these


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    A model that keeps white space as it is (all that are trained here do) is made lossless: its marker for a space is
    spelled in bytes where a text holds it, and long texts are encoded in sections, byte pairs word by word. Any other
    model, such as Llama's, which puts a space in front of every text, encodes and decodes just as the sentencepiece
    library does with it.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, endoftext: str | None = None, name: str = "tokenizer.model"):
        self._model = model
        self.processor = _processor(model, name)
        self.vocab_size = self.processor.vocab_size()
        self.endoftext = _end_symbol(self.processor, endoftext, name)
        self.endoftext_id = self.processor.piece_to_id(self.endoftext)
        self.unknown_id = self.processor.unk_id()
        byte_ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._spells_bytes = all(map(self.processor.is_byte, byte_ids))
        self._byte_ids = byte_ids
        probe = self.processor.encode(_PROBE)
        spelled = self.decode_bytes(probe)
        self.prefix = b" " if spelled == b" " + self.processor.decode(probe).encode("utf-8") else b""
        self._keeps_space = spelled == _PROBE.encode("utf-8")
        self._reads_endoftext = not self.processor.is_control(self.endoftext_id)
        # Cut so that no part can be taken for endoftext, and what is spelled in bytes stands alone.
        end = re.escape(self.endoftext[:-1]), re.escape(self.endoftext[-1])
        whole = len(self.endoftext) == 1
        self._cuts = re.compile(f"([{_MARKER}{end[1]}])" if whole else f"({_MARKER})|(?<={end[0]})(?={end[1]})")

    def content(self) -> bytes:
        return self._model

    def _parts(self, text: str) -> Iterable[str]:
        return super()._parts(text) if self._keeps_space else [text]

    def _encode(self, text: str) -> list[int]:
        ids = self._encode_between_cuts(text)
        if not (self._spells_bytes or self.replaces_unknown) and self.unknown_id in ids:
            raise DataError(
                f"character {self._first_unknown(text)!r} is unknown to the tokenizer; "
                "use a model with byte fallback (kinds bpe and unigram have it)"
            )
        return ids

    def _encode_between_cuts(self, text: str) -> list[int]:
        if not self._has_cuts(text):
            return self._encode_uncut(text)
        ids: list[int] = []
        for part in filter(None, self._cuts.split(text)):
            ids += self._in_bytes(part) if self._stands_alone(part) else self._encode_uncut(part)
        return ids

    def _stands_alone(self, part: str) -> bool:
        """Whether this is the marker, or an endoftext of one character, which no cut can take apart."""
        return (part == _MARKER and self._keeps_space) or (part == self.endoftext and self._spells_bytes)

    def _in_bytes(self, part: str) -> list[int]:
        return [self._byte_ids[byte] for byte in part.encode("utf-8")]

    def _has_cuts(self, text: str) -> bool:
        return (self._reads_endoftext and self.endoftext in text) or (self._keeps_space and _MARKER in text)

    def _encode_uncut(self, text: str) -> list[int]:
        if self._words is not None:
            return self._words.encode(text)[0].tolist()
        ids: list[int] = self.processor.encode(text)
        if self.endoftext_id in ids:
            raise self._would_end()
        return ids

    def _would_end(self) -> DataError:
        return DataError(
            f"the tokenizer would read its end of text, {self.endoftext}, in what this text becomes when it is "
            f"normalized; leave the text out, or {NAME_ENDOFTEXT}"
        )

    def tokens(self, text: str, dtype: np.typing.DTypeLike) -> tuple[np.ndarray, bool]:
        if not (self._keeps_space and self._spells_bytes) or self._has_cuts(text):
            return super().tokens(text, dtype)
        encode = self._encode_array if self._words is None else self._words.encode
        parts = [*map(encode, self._parts(text))]
        return self._closed([tokens for tokens, _ in parts], dtype), all(exact for _, exact in parts)

    def _encode_array(self, part: str) -> tuple[np.ndarray, bool]:
        """The tokens of a part, never as integers of Python's, and whether they spell it."""
        ids = self.processor.encode(part, return_type="numpy")
        if (ids == self.endoftext_id).any():
            raise self._would_end()
        return ids.astype(np.min_scalar_type(self.vocab_size - 1)), self.decode_bytes(ids) == part.encode("utf-8")

    @functools.cached_property
    def _words(self) -> Words | None:
        """What encodes by words; None where that may give other tokens, or where not every byte has a piece."""
        if not (self._keeps_space and self._spells_bytes):
            return None
        trainer, normalizer = submessages(self._model, _TRAINER, _NORMALIZER)
        byte_pairs, rewrites = trainer.get(_MODEL_TYPE) == _BPE, bool(normalizer.get(_CHARACTERS))
        pieces = map(self.processor.id_to_piece, range(self.vocab_size))
        if not byte_pairs or rewrites or any(crosses_words(piece.replace(_MARKER, " ")) for piece in pieces):
            return None
        return Words(self.processor.encode, self._bytes.tolist())

    def _place(self, part: str, *, opens: bool) -> tuple[list[int], list[int]]:
        if self._keeps_space:
            return super()._place(part, opens=opens)
        found = (self.processor if opens else self._inner).encode(part, return_type="offset_mapping")
        return found["ids"], [min(begin, len(part) - 1) for begin, _ in found["offsets"]]

    def symbol_id(self, symbol: str) -> int | None:
        """The id of a control symbol such as <s>, if the model has it."""
        return self.symbol_ids.get(symbol)

    def symbol(self, index: int) -> str:
        """How the symbol of an id is spelled."""
        return self.processor.id_to_piece(index)

    @functools.cached_property
    def symbol_ids(self) -> dict[str, int]:
        control = [index for index in range(self.vocab_size) if self.processor.is_control(index)]
        return {self.processor.id_to_piece(index): index for index in (*control, self.endoftext_id)}

    @functools.cached_property
    def _inner(self) -> "sentencepiece.SentencePieceProcessor":  # type: ignore[name-defined]  # noqa: F821
        """Encodes what follows a symbol: no space in front."""
        # A protocol buffer appended to another overrides it: normalizer_spec { add_dummy_prefix (3): false }
        return _processor(self._model + bytes([_NORMALIZER << 3 | 2, 2, 3 << 3, 0]), "")

    def _first_unknown(self, text: str) -> str:
        found = self.processor.encode(text, return_type="offset_mapping")
        begins = (
            begin for index, (begin, _) in zip(found["ids"], found["offsets"], strict=True) if index == self.unknown_id
        )
        begin = next(begins, None)
        return _MARKER if begin is None else text[begin]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return bytes_of(ids, self._bytes)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        if self._keeps_space:
            return super().decode(ids)
        return self.processor.decode([int(index) for index in ids if index != self.endoftext_id])

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        processor = self.processor

        def spelled(index: int) -> bytes:
            piece = processor.id_to_piece(index)
            if index == self.endoftext_id or processor.is_control(index):
                return b""
            if processor.is_byte(index):
                return bytes([int(piece[1:-1], 16)])
            return piece.replace(_MARKER, " ").encode("utf-8")

        return bytes_table([spelled(index) for index in range(self.vocab_size)])


class VocabularyError(DataError):
    """A vocabulary larger than the text can give: `most`."""

    def __init__(self, vocab: int, most: int):
        super().__init__(f"tokenizer.vocab={vocab} is more than this text can give: at most {most}")
        self.most = most


def train_sentencepiece(cfg: TokenizerConfig, texts: Iterable[str]) -> SentencePieceTokenizer:
    """A lossless model learned from the texts, line by line.

    No normalization and no added or trimmed space; every byte has a piece to fall back to; newline and tab are symbols,
    so a piece never crosses a line; runs of spaces may become pieces, which keeps indented text short. Raises
    VocabularyError if the texts cannot give `cfg.vocab` pieces, DataError if they need more or there are none.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type=cfg.kind,
            vocab_size=cfg.vocab,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=[ENDOFTEXT, "\n", "\t"],
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 24,
            num_threads=1,  # the order of sums, and with it the model, would depend on it
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _training_failure(cfg, str(error)) from error
    return SentencePieceTokenizer(model.getvalue(), ENDOFTEXT)


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.translate(_NOT_LEARNED).split("\n"):
            if line:
                yield from sections(line)


def _training_failure(cfg: TokenizerConfig, reason: str) -> DataError:
    if high := re.search(r"Vocabulary size too high .*<= (\d+)", reason):
        return VocabularyError(cfg.vocab, int(high[1]))
    if low := re.search(r"smaller than required_chars. \d+ vs (\d+)", reason):
        return DataError(f"tokenizer.vocab={cfg.vocab} is too small for the characters of this text: at least {low[1]}")
    if "sentences_.empty()" in reason:
        return DataError(NO_TEXT)
    return DataError(f"SentencePiece could not train ({cfg.kind}, vocab {cfg.vocab}): {reason.splitlines()[0]}")


def _processor(model: bytes, name: str) -> "sentencepiece.SentencePieceProcessor":  # type: ignore[name-defined]  # noqa: F821
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        if not model or processor.vocab_size() == 0:
            raise RuntimeError("it is empty")
    except RuntimeError as error:
        raise DataError(f"{name} is not a SentencePiece model: {str(error).splitlines()[0]}") from error
    return processor


def _end_symbol(processor: "sentencepiece.SentencePieceProcessor", wanted: str | None, name: str) -> str:  # type: ignore[name-defined]  # noqa: F821
    candidates = _CUSTOMARY_ENDS if wanted is None else (wanted,)
    for symbol in candidates:
        if processor.id_to_piece(processor.piece_to_id(symbol)) == symbol:
            return symbol
    raise DataError(f"{name} has no symbol {' or '.join(candidates)}; {NAME_ENDOFTEXT}")
