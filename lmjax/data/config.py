"""What to prepare, how to cut it into tokens, and what a training run reads of it."""

import dataclasses
import itertools
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lmjax.errors import ConfigError
from lmjax.names import names_in
from lmjax.schema import NonNegativeInt, PositiveFloat, PositiveInt, Seed, Size, config_class, one_of

_LEAST = 1e-9  # share of the documents that can be for validation


@config_class
class TokenizerConfig:
    """A tokenizer trained on the documents, or given as a file."""

    kind: Literal["bpe", "unigram", "wordpiece", "bytes", "chars", "file"] = "bpe"
    """Trained here, on the training documents alone: SentencePiece (bpe, unigram), or WordPiece by Hugging Face's
    tokenizers; raw bytes; the characters that occur (in any document, those for validation included); or a file."""
    vocab: Annotated[int, Field(gt=0, lt=2**31)] = 32_000
    """Vocabulary size of the trained kinds, the 256 bytes and three symbols included; a text too short for it gives as
    many as it can."""
    sample_bytes: PositiveInt = 100_000_000
    """Text that bpe, unigram and wordpiece learn from: a random sample of passages of the training documents.
    Learning takes about 0.15 s (bpe) or 5 s (unigram) per million bytes."""
    path: str | None = None
    """The file of kind `file`: a SentencePiece .model or a Hugging Face tokenizer.json."""
    endoftext: str | None = None
    """The symbol of kind `file` that ends a document; by default the first of the customary names that it knows."""

    def __post_init__(self) -> None:
        if (self.kind == "file") != (self.path is not None):
            raise ConfigError(f"tokenizer.path={self.path!r} and tokenizer.kind={self.kind!r}: `file` needs a path, "
                              "and only `file` takes one")  # fmt: skip
        if self.endoftext is not None and self.kind != "file":
            raise ConfigError(f"tokenizer.endoftext={self.endoftext!r}: only kind `file` takes it, not {self.kind!r}")

    @property
    def learns(self) -> bool:
        """Whether it learns `vocab` tokens from texts."""
        return self.kind in ("bpe", "unigram", "wordpiece")


def _template(name: str) -> str:
    known = [*names_in("lmjax.data.chat.templates", "TEMPLATES"), "tokenizer"]
    if name not in known and not name.endswith(".jinja"):
        raise ValueError(f"there is no template '{name}'; choose one of {', '.join(known)}, or a file *.jinja")
    return name


@config_class
class ChatConfig:
    """How conversations become text, and which of its tokens are scored: what a model is trained on to write."""

    template: Annotated[str, AfterValidator(_template)] = "tokenizer"
    """`instruction` (Chollet's), `alpaca`, `chatml`; `tokenizer` for the one that came with it; or a file, *.jinja."""
    score: Literal["responses", "last", "all"] = "responses"
    """What the assistant wrote in each of its turns, but for messages with `"weight": 0`; in the last one alone; or
    every token, the prompts' too."""
    headers: bool = False
    """Score what announces a scored response, too, such as `<|im_start|>assistant`."""
    ends: bool = True
    """Score what closes a scored response, too: its end mark and, after the last one, the end of the document."""
    longest: PositiveInt | None = None
    """The most tokens of a conversation, its end included. Rows of training hold `data.seq_len` + 1."""
    too_long: Literal["error", "left", "right"] = "error"
    """A longer one stops it, or is cut at its left or its right (and counted)."""


@config_class
class PrepareConfig:
    """A recipe: from text to a directory of token shards. All but `workers` and `document_bytes` fixes the result."""

    inputs: tuple[str, ...] = ("stdlib:",)
    """Files by glob, or folders with all that is in them: .txt, .txt.gz, .py, .jsonl, .jsonl.gz, .jsonl.zst, .json.gz,
    .parquet, and .json where it is named; `stdlib:` is the source code of the running Python's standard library, a
    corpus that every machine has."""
    text_key: str = "text"
    """The field of a JSON line, or the column of a Parquet file, that holds the text."""
    document_separator: str | None = None
    """Splits a .txt file into documents, itself left out; by default a file is one document."""
    document_bytes: PositiveInt = 1 << 27
    """The longest document, or line of JSON, that is read, decompressed: to prepare one takes about nine times as much
    memory. A longer one stops it."""
    invalid_utf8: Literal["error", "replace", "skip"] = "error"
    """Stop, put U+FFFD in place of what cannot be decoded, or leave the document out (and count it)."""
    normalize: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode normalization form. NFC keeps what a reader sees, NFKC does not; neither can be undone."""
    newlines: Literal["keep", "unix"] = "keep"
    """`unix` turns CRLF and CR into LF."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    unknown: Literal["error", "replace", "skip"] = "error"
    """Where the tokenizer of kind `file` cannot represent a text: stop, put its unknown symbol there, or leave the
    document out (and count it)."""
    split: Literal["document", "tail"] = "document"
    """`document` draws the validation documents with `seed`; `tail` makes the last characters of the one text it. Where
    documents are too few to draw from, the last characters of each are it. What `lmjax curate` held out is it, where
    the inputs are such files."""
    valid_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the documents (`document`) or of the characters (`tail`) that becomes the validation split."""
    seed: Seed = 0
    """Draws the validation documents and the tokenizer's sample."""
    shard_tokens: PositiveInt = 1 << 26
    """A shard is closed with the first document that brings it to this many tokens."""
    chat: ChatConfig | None = None
    """The inputs are conversations, one JSON object each (.jsonl, .json): {messages}, {prompt, response} or
    {instruction, input, response} (docs/tuning.md)."""
    workers: PositiveInt | None = None
    """Processes that encode; by default one per CPU. The result does not depend on it."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigError("prepare.inputs is empty: name at least one file, glob or `stdlib:`")
        if 0 < self.valid_fraction < _LEAST:
            raise ConfigError(
                f"prepare.valid_fraction={self.valid_fraction} is less than one document of a billion; 0 is for none"
            )
        if self.chat is not None:
            self._check_chat()
        if self.document_separator == "":
            raise ConfigError("prepare.document_separator is empty: give a string such as '\\n\\n', or None")

    def _check_chat(self) -> None:
        if self.tokenizer.kind not in ("file", "bytes"):
            raise ConfigError(
                f"prepare.chat needs a tokenizer that is there already, not tokenizer.kind={self.tokenizer.kind}; use "
                "kind file, or bytes"
            )
        plain = {"normalize": "none", "newlines": "keep", "split": "document", "unknown": "error"}
        for name, only in plain.items():
            if getattr(self, name) != only:
                raise ConfigError(f"prepare.{name}={getattr(self, name)} is for texts; with chat it is {only!r}")


@config_class
class SourceConfig:
    """One prepared data set of a mixture."""

    path: str
    """The prepared directory; in a bucket (gs://, s3://) it is staged to local disk first."""
    weight: PositiveFloat = 1.0
    """Its share of the samples, relative to the other sources."""
    tokens: PositiveInt | None = None
    """Train on so many of its tokens alone, over and over: on random documents, the same ones in every run, and among
    those of any larger number. None is all. Validation is not touched."""
    prepare: PrepareConfig | None = None
    """The recipe to prepare the directory by, if nothing is there yet."""

    @property
    def learning(self) -> PrepareConfig | None:
        """The recipe, if it trains a tokenizer of its own, of `tokenizer.vocab` tokens."""
        return self.prepare if self.prepare is not None and self.prepare.tokenizer.learns else None


@config_class
class DataConfig:
    """What a training run reads: samples of `seq_len` tokens from a weighted mixture of sources."""

    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    """The mixture, by name."""
    mixture: Annotated[str, one_of(names_in("lmjax.data.mixture", "MIXTURES"))] = "by_weight"
    """What the sources' shares of the samples are: their weights, or weight times size."""
    seq_len: Size = 256
    """Tokens per row."""
    documents: Literal["joined", "separate", "whole"] = "joined"
    """`joined`: one stream, documents told apart by endoftext alone. `separate`: rows carry segment ids, positions
    restart with each document, and the target that would cross into the next document has weight 0. `whole`: so do
    they, but no document is cut: as many as fit make a row, and padding fills it up."""
    seed: Seed = 0
    """Fixes the order of documents and windows in every epoch."""
    prefetch: NonNegativeInt = 8
    """Batches made ahead by a background thread; 0 makes each when it is asked for."""
    verify: Literal["sizes", "full"] = "sizes"
    """Before the first step: compare file sizes and index hashes, or hash every byte. Either way each block of tokens
    is checked against its checksum when it is first read."""
    cache: str = "~/.cache/lmjax/data"
    """Where data sets from buckets are staged."""

    def __post_init__(self) -> None:
        learning = [(name, s.path, s.learning.inputs) for name, s in self.sources.items() if s.learning]
        for (first, path, inputs), (name, _, others) in itertools.pairwise(learning):
            if inputs != others:
                raise ConfigError(
                    f"data.sources.{first} and {name} would each learn a tokenizer, but all sources share one: give "
                    f"the recipe of {name} tokenizer.kind=file and tokenizer.path={path}/tokenizer"
                )
