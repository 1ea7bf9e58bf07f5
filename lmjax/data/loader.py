"""Batches for training, from any sample on, made ahead by Grain."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TypedDict

import numpy as np

from lmjax.data import storage
from lmjax.data.batch import Batch
from lmjax.data.config import DataConfig, SourceConfig
from lmjax.data.mixture import Mixture
from lmjax.data.shards import Dataset, TokenSplit, open_dataset, verify_dataset
from lmjax.data.windows import Windows, as_batch
from lmjax.errors import ConfigError, DataError

_ORDER = 1  # raised whenever the order of samples changes for the same config and data
_ENDLESS = 1 << 48


class Position(TypedDict):
    """How far a source is."""

    order: str
    """Names the source's order of samples."""
    cursor: int
    """Samples taken from it."""


class Origin(TypedDict):
    """Where the mixture was last changed."""

    sample: int
    cursors: dict[str, int]


class LoaderState(TypedDict):
    """All that a checkpoint keeps of a loader, as JSON."""

    fingerprint: str
    """Names everything that fixes the order of samples."""
    next_sample: int
    origin: Origin
    sources: dict[str, Position]


@dataclasses.dataclass(frozen=True)
class _Source:
    name: str
    windows: Windows
    order: str
    vocab_size: int


class Loader:
    """Iterates over batches of training samples, forever, from the global sample index `start` on.

    Sample g is a pure function of (`fingerprint`, g): rows, batch size, prefetch and the number of processes only
    choose which samples go into an array together.

    Args:
        cfg: what to read.
        batch_size: rows of the global batch.
        rows: the rows of it that this process makes; all by default.
        start: a sample index, or the `state` of a loader to go on from.
        allow_data_change: take a state of other data or another mixture: a source whose own order is unchanged goes on
            where it was, any other starts from its beginning, and the fingerprint is a new one.

    Raises DataError for a data set that is missing, damaged, or not the one of the state; for sources of different
    tokenizers; ConfigError for a config without sources.
    """

    def __init__(
        self,
        cfg: DataConfig,
        *,
        batch_size: int,
        rows: slice | None = None,
        start: LoaderState | int = 0,
        allow_data_change: bool = False,
    ):
        if not cfg.sources:
            raise ConfigError("data.sources is empty: name at least one prepared directory, data.sources.NAME.path=DIR")
        self._cfg = cfg
        self._batch_size = batch_size
        self._rows = np.arange(batch_size)[rows or slice(None)]
        self._sources = _open_sources(cfg)
        self.next_sample, self._origin = self._resume(start, allow_data_change)
        self.fingerprint = self._fingerprint(self._origin)
        self._mixture = Mixture(
            [cfg.sources[source.name].weight for source in self._sources],
            self._origin["sample"],
            [self._origin["cursors"][source.name] for source in self._sources],
        )

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `start` on; batch i holds samples `start + i * batch_size` and following."""
        import grain

        threads = 1 if self._cfg.prefetch else 0
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._cfg.prefetch)
        for element in grain.MapDataset.source(_Batches(self)).to_iter_dataset(options):
            if isinstance(element, DataError):
                raise element
            yield element

    def batch(self, next_sample: int) -> Batch:
        """This process's rows of the batch that starts with sample `next_sample`. Raises DataError for damaged data."""
        samples = next_sample + self._rows
        source, cursor = self._mixture.locate(samples)
        separate = self._cfg.documents == "separate"
        if len(self._sources) == 1:
            return as_batch(*self._sources[0].windows.gather(cursor, segments=separate), samples)
        tokens = np.empty((len(samples), self._cfg.seq_len + 1), np.int32)
        segments = np.empty_like(tokens) if separate else None
        for index in np.unique(source):
            rows = source == index
            tokens[rows], found = self._sources[index].windows.gather(cursor[rows], segments=separate)
            if segments is not None:
                segments[rows] = found
        return as_batch(tokens, segments, samples)

    def state(self, next_sample: int) -> LoaderState:
        """What to store so that a loader goes on with sample `next_sample`, at any batch size."""
        cursors = self._mixture.cursors(next_sample)
        return LoaderState(
            fingerprint=self.fingerprint,
            next_sample=next_sample,
            origin=self._origin,
            sources={
                source.name: Position(order=source.order, cursor=cursor)
                for source, cursor in zip(self._sources, cursors, strict=True)
            },
        )

    def epoch(self, next_sample: int) -> dict[str, float]:
        """How often each source was seen, by name, when the samples before `next_sample` are done."""
        cursors = self._mixture.cursors(next_sample)
        return {
            source.name: cursor / source.windows.n_windows
            for source, cursor in zip(self._sources, cursors, strict=True)
        }

    @property
    def vocab_size(self) -> int:
        """That of the sources' tokenizer."""
        return self._sources[0].vocab_size

    def _fingerprint(self, origin: Origin) -> str:
        content = {
            "order": _ORDER,
            "documents": self._cfg.documents,
            "origin": origin,
            "sources": {source.name: [source.order, self._cfg.sources[source.name].weight] for source in self._sources},
        }
        return storage.hash_bytes(json.dumps(content, sort_keys=True).encode())

    def _resume(self, start: LoaderState | int, allow_data_change: bool) -> tuple[int, Origin]:
        """The sample to go on with, and the mixture's origin."""
        if isinstance(start, int):
            return start, Origin(sample=0, cursors={source.name: 0 for source in self._sources})
        origin, next_sample = start["origin"], start["next_sample"]
        same_sources = origin["cursors"].keys() == {source.name for source in self._sources}
        found = self._fingerprint(origin)
        if same_sources and found == start["fingerprint"]:
            return next_sample, origin
        if not allow_data_change:
            raise DataError(
                f"the data is not what this run was trained on: fingerprint {found[:16]} now, "
                f"{start['fingerprint'][:16]} then (data set, seed, seq_len, documents or weights); restore it, or go "
                "on with other data by --allow-data-change"
            )
        cursors = {source.name: _carried_cursor(source, start["sources"]) for source in self._sources}
        return next_sample, Origin(sample=next_sample, cursors=cursors)


class _Batches:
    """The loader as Grain wants it: batch i by random access. An error is an element, since Grain would rewrap it."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Batch | DataError:
        try:
            return self._loader.batch(self._loader.next_sample + int(index) * self._loader._batch_size)
        except DataError as error:
            return error


def _carried_cursor(source: _Source, positions: Mapping[str, Position]) -> int:
    position = positions.get(source.name)
    return position["cursor"] if position is not None and position["order"] == source.order else 0


def _open_sources(cfg: DataConfig) -> list[_Source]:
    """The sources in order of their names, which a reordered config does not change."""
    datasets = {name: _open(cfg, source) for name, source in sorted(cfg.sources.items())}
    first_name, first = next(iter(datasets.items()))
    for name, dataset in datasets.items():
        if dataset.manifest.tokenizer_hash != first.manifest.tokenizer_hash:
            raise DataError(
                f"data.sources.{name} and data.sources.{first_name} were prepared with different tokenizers; "
                "prepare both with the same one (tokenizer.kind=file)"
            )
    return [_source(cfg, name, dataset) for name, dataset in datasets.items()]


def _open(cfg: DataConfig, source: SourceConfig) -> Dataset:
    opener = verify_dataset if cfg.verify == "full" else open_dataset
    return opener(source.path, cache=cfg.cache)


def _source(cfg: DataConfig, name: str, dataset: Dataset) -> _Source:
    split: TokenSplit = dataset.split("train")
    order = storage.hash_bytes(json.dumps([_ORDER, split.hash, cfg.seq_len, cfg.seed]).encode())
    return _Source(name, Windows(split, cfg.seq_len, cfg.seed), order, dataset.manifest.vocab_size)
