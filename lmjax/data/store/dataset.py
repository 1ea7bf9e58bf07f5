"""A prepared data set, opened for reading and verified."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from etils import epath

from lmjax.data.chat.templates import load_template
from lmjax.data.config import DataConfig
from lmjax.data.store.manifest import Manifest, ShardManifest, read_manifest
from lmjax.data.store.shards import TOKENIZER, TokenSplit, shard_files, shard_sizes, unlisted
from lmjax.data.store.staging import stage
from lmjax.data.tokenizers.load import load_tokenizer, saved_hash
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import ConfigError, DataError
from lmjax.record import files


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared data set on local disk."""

    path: epath.Path
    manifest: Manifest

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the data set was prepared with."""
        return load_tokenizer(self.path / TOKENIZER)

    def split(self, name: Literal["train", "valid"]) -> TokenSplit:
        """A split. Raises DataError if the data set does not have it."""
        manifest = self.manifest
        if name not in manifest.splits:
            raise DataError(f"{self.path} has no {name} split; prepare it with a valid_fraction between 0 and 1")
        return TokenSplit(self.path, manifest.splits[name], np.dtype(manifest.dtype), manifest.vocab_size)


def open_dataset(path: str | os.PathLike[str], *, cache: str | None = None) -> Dataset:
    """The prepared data set at `path`, staged under `cache` first if it is in a bucket.

    Reads the manifest and the tokenizer's files and compares file sizes: quick for any size. Raises DataError for a
    missing or damaged manifest, a shard that is missing, truncated or not listed, a tokenizer that is not the data
    set's.
    """
    located = files.locate(path)
    manifest = read_manifest(located)
    if files.is_remote(located):
        located = stage(located, manifest, cache)
    for split in manifest.splits.values():
        for shard in split.shards:
            _check_sizes(located, shard, manifest.dtype)
    if found := unlisted(located, manifest):
        raise DataError(f"{found[0]} is not listed in the manifest; move it away, or prepare the data set again")
    if saved_hash(located / TOKENIZER) != manifest.tokenizer_hash:
        raise DataError(f"the tokenizer in {located / TOKENIZER} is not the one that the data set was made with")
    if manifest.template_hash is not None and load_template(located / TOKENIZER).hash != manifest.template_hash:
        raise DataError(f"the chat template in {located / TOKENIZER} is not the one that the data set was made with")
    return Dataset(located, manifest)


def verify_dataset(path: str | os.PathLike[str], *, cache: str | None = None) -> Dataset:
    """`open_dataset`, then every byte compared with the manifest's hashes. DataError names the first bad file."""
    dataset = open_dataset(path, cache=cache)
    for split in dataset.manifest.splits.values():
        for shard in split.shards:
            for name, expected in shard_files(shard).items():
                if files.hash_file(dataset.path / name) != expected:
                    raise DataError(f"{dataset.path / name} is damaged: its hash is not the manifest's; restore it")
    return dataset


def open_sources(cfg: DataConfig, *, verify: bool = False) -> dict[str, Dataset]:
    """The data sets of a config by name, which share one tokenizer; with `verify`, every byte of them is checked.

    Raises ConfigError for a config without sources, and DataError as `open_dataset` and `verify_dataset` do, and for
    data sets of different tokenizers.
    """
    if not cfg.sources:
        raise ConfigError(
            "data.sources is empty: name at least one prepared directory, data.sources.NAME.path=DIR, or use a config "
            "that does, e.g. --config=configs/quickstart.py"
        )
    opener = verify_dataset if verify else open_dataset
    datasets = {name: opener(source.path, cache=cfg.cache) for name, source in cfg.sources.items()}
    first_name, first = next(iter(datasets.items()))
    check_same_tokenizer(
        datasets,
        first.manifest.tokenizer_hash,
        lambda name: (
            f"data.sources.{name} and data.sources.{first_name} were prepared with different tokenizers; "
            "prepare both with the same one (tokenizer.kind=file)"
        ),
    )
    return datasets


def check_same_tokenizer(datasets: Mapping[str, Dataset], expected_hash: str, said: Callable[[str], str]) -> None:
    """Raise a DataError, as `said` of its name, for the first data set that was prepared with another tokenizer."""
    for name, dataset in datasets.items():
        if dataset.manifest.tokenizer_hash != expected_hash:
            raise DataError(said(name))


def _check_sizes(directory: epath.Path, shard: ShardManifest, dtype: str) -> None:
    for name, expected in shard_sizes(shard, dtype).items():
        path = directory / name
        if not path.exists():
            raise DataError(f"{path} is missing; restore it or prepare the data set again")
        found = path.stat().length
        if found != expected:
            raise DataError(
                f"{path} has {found} bytes instead of {expected} ({shard.tokens} tokens of {dtype}): truncated or of "
                "another type; restore it or prepare the data set again"
            )
