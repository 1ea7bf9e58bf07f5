"""The manifest of a prepared data set: what its shards hold, by count and by hash, sealed with its own hash."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from etils import epath
from pydantic import Field

from lmjax.errors import DataError
from lmjax.record import files, formats
from lmjax.schema import NonNegativeInt, PositiveInt, config_class, first_problem

FORMAT: Literal[1] = 1
FILE = "manifest.json"

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@config_class
class ShardManifest:
    """One shard: files `name.tokens`, `name.documents`, `name.checksums` and perhaps `name.scored` and `name.weights`,
    see `shards.py`."""

    name: Annotated[str, Field(pattern=r"^(train|valid)-\d{5,}$")]
    tokens: PositiveInt
    documents: PositiveInt
    text_bytes: NonNegativeInt
    """UTF-8 bytes of the documents' text, of conversations that of the scored tokens: it makes bits per byte exact."""
    inexact_documents: NonNegativeInt
    """Documents that decode to other text than was encoded: 0 with a lossless tokenizer."""
    unknown_documents: NonNegativeInt = 0
    """Documents that the tokenizer cannot represent in full: in which it put its unknown symbol, or that were left out
    since the shard before."""
    tokens_hash: Hash
    documents_hash: Hash
    checksums_hash: Hash
    scored_hash: Hash | None = None
    scored_tokens: PositiveInt | None = None
    """Tokens that a model is trained on to write; None where those are all of them."""
    weights_hash: Hash | None = None
    """None where all that is scored weighs the same."""
    truncated_documents: NonNegativeInt = 0
    """Documents that were cut to their longest length."""

    def __post_init__(self) -> None:
        if (self.scored_hash is None) != (self.scored_tokens is None):
            raise ValueError("scored_hash and scored_tokens go together")
        if self.weights_hash is not None and self.scored_hash is None:
            raise ValueError("weights_hash goes with scored_hash")


@config_class
class SplitManifest:
    """A split: the sums over its shards."""

    tokens: PositiveInt
    documents: PositiveInt
    text_bytes: NonNegativeInt
    inexact_documents: NonNegativeInt
    shards: tuple[ShardManifest, ...]

    def __post_init__(self) -> None:
        for total in ("tokens", "documents", "text_bytes", "inexact_documents"):
            if getattr(self, total) != sum(getattr(shard, total) for shard in self.shards):
                raise ValueError(f"{total} is not the sum of its shards'")

    @property
    def scored_tokens(self) -> int | None:
        """Tokens that a model is trained on to write; None where those are all of them."""
        counts = [shard.scored_tokens for shard in self.shards if shard.scored_tokens is not None]
        return sum(counts) if counts else None

    @property
    def truncated_documents(self) -> int:
        return sum(shard.truncated_documents for shard in self.shards)

    @property
    def hash(self) -> str:
        """Names the content: that of the token files in order, and of what says which tokens are scored, and how."""
        hashes = [(shard.tokens_hash, shard.scored_hash, shard.weights_hash) for shard in self.shards]
        return files.hash_bytes(*(one.encode() for of_shard in hashes for one in of_shard if one is not None))

    @property
    def digest(self) -> str:
        """The first 16 hex digits of `hash`, to stand beside the numbers that were measured on this split."""
        return self.hash[:16]

    @classmethod
    def of(cls, shards: tuple[ShardManifest, ...]) -> "SplitManifest":
        """The split that these shards make."""
        return cls(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            inexact_documents=sum(shard.inexact_documents for shard in shards),
            shards=shards,
        )


@config_class
class Manifest:
    """A prepared data set."""

    format: Literal[1] = FORMAT
    dtype: Literal["uint16", "uint32"]
    """The type of the token files, little endian."""
    vocab_size: PositiveInt
    tokenizer_hash: Hash
    endoftext_id: NonNegativeInt
    normalization: dict[str, str]
    empty_documents: NonNegativeInt
    """Documents without any text, left out."""
    invalid_documents: NonNegativeInt
    """Documents that were not UTF-8, left out as the recipe said."""
    unknown_documents: NonNegativeInt = 0
    """Documents that the tokenizer cannot represent in full, replaced in or left out as the recipe said."""
    template_hash: Hash | None = None
    """Of the chat template that wrote the documents, which lies beside the tokenizer: `Template.hash`."""
    splits: dict[Literal["train", "valid"], SplitManifest]
    curations: tuple[Hash, ...] = ()
    """The fingerprints of the curations that made the input files."""
    recipe: dict[str, Any]
    """The PrepareConfig, hashes of the input files' names and sizes and of their content, how validation text was split
    off, and the version of lmjax that did it: for the record, not part of `fingerprint`."""

    def __post_init__(self) -> None:
        for split, content in self.splits.items():
            names = [shard.name for shard in content.shards]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{twice} is listed twice")
            if not all(name.startswith(split) for name in names):
                raise ValueError(f"{split} lists shards of another split")
            if len({shard.scored_hash is None for shard in content.shards}) > 1:
                raise ValueError(f"only some shards of {split} say which tokens are scored")
        if self.endoftext_id >= self.vocab_size:
            raise ValueError(f"endoftext_id={self.endoftext_id} is outside the vocabulary of {self.vocab_size}")

    @property
    def fingerprint(self) -> str:
        """Hash of all that fixes the tokens: the same data prepared in another place has the same."""
        content = _as_json(self)
        del content["recipe"]
        return _hash(content)


def write_manifest(manifest: Manifest, directory: epath.Path) -> None:
    """Write it, with its fingerprint and a seal over everything, atomically: from now on the data set exists."""
    content = _as_json(manifest) | {"fingerprint": manifest.fingerprint}
    text = json.dumps(content | {"seal": _hash(content)}, indent=2, sort_keys=True, ensure_ascii=False)
    # The names of input files need not be UTF-8; JSON spells what is not as \udcXX, as backslashreplace does.
    files.write_bytes(directory / FILE, text.encode("utf-8", "backslashreplace"))


def read_manifest(directory: epath.Path) -> Manifest:
    """The manifest of a prepared data set. Raises DataError if there is none, or it is not as it was written."""
    path = directory / FILE
    with files.reporting(path):
        if not path.exists():
            raise DataError(f"{directory} holds no prepared data set (no {FILE}); run lmjax prepare first")
    try:
        content = json.loads(files.read_bytes(path))
        seal, fingerprint = content.pop("seal"), content["fingerprint"]
        if seal != _hash(content):
            raise ValueError("its content is not what was sealed")
        recipe = content.get("recipe")
        by = recipe.get(formats.STAMP) if isinstance(recipe, dict) else None
        formats.check(path, content.get("format"), by, FORMAT, DataError)
        manifest = Manifest(**{key: value for key, value in content.items() if key != "fingerprint"})
        if manifest.fingerprint != fingerprint:
            raise ValueError("its fingerprint is not that of its content")
    except DataError:
        raise
    except pydantic.ValidationError as error:
        problem = first_problem(error)
        raise DataError(f"{path} is not a manifest of format {FORMAT}: {problem}; prepare again") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); restore it or prepare the data set again") from error
    return manifest


def as_json(shard: ShardManifest) -> str:
    """A shard's record, by which an interrupted `prepare` knows that the shard is done."""
    return json.dumps(dataclasses.asdict(shard), sort_keys=True)


# What earlier manifests did not have, where it says nothing: they are to keep their fingerprints.
_LATER: dict[str, Any] = {
    "unknown_documents": 0,
    "scored_hash": None,
    "scored_tokens": None,
    "weights_hash": None,
    "truncated_documents": 0,
    "template_hash": None,
    "curations": (),
}


def _as_json(manifest: Manifest) -> dict[str, Any]:
    content = dataclasses.asdict(manifest)
    for part in (content, *(shard for split in content["splits"].values() for shard in split["shards"])):
        for name in [name for name, nothing in _LATER.items() if name in part and part[name] == nothing]:
            del part[name]
    return content


def _hash(content: Mapping[str, Any]) -> str:
    return files.hash_bytes(json.dumps(content, sort_keys=True).encode())
