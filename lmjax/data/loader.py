"""Batches for training, from any sample on, made ahead by Grain."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NotRequired

import numpy as np
import pydantic
from typing_extensions import TypedDict

from lmjax.data.batch import Batch
from lmjax.data.config import DataConfig
from lmjax.data.mixture import MIXTURES, SHORTEST, Mixture, close_resolution
from lmjax.data.packing import PackedRows
from lmjax.data.store.dataset import Dataset, open_sources
from lmjax.data.store.shards import TokenSplit
from lmjax.data.windows import Windows, as_batch
from lmjax.errors import CheckpointError, DataError
from lmjax.record import files
from lmjax.schema import NonNegativeInt, PositiveInt, first_problem

logger = logging.getLogger(__name__)

_ORDER = 1  # raised whenever the order of samples changes for the same config and data
_ENDLESS = 1 << 48
_ELEMENT_TOKENS = 1 << 16  # small batches are read several at a time, to spread what each read costs


class Position(TypedDict):
    """How far a source is."""

    order: str
    """Names the source's order of samples."""
    cursor: NonNegativeInt
    """Samples taken from it."""


class Origin(TypedDict):
    """Where the mixture was last changed."""

    sample: NonNegativeInt
    cursors: dict[str, NonNegativeInt]
    resolution: NotRequired[PositiveInt]
    """The resolution of the mixture's shares, where it is not the shortest."""


class LoaderState(TypedDict):
    """All that a checkpoint keeps of a loader, as JSON."""

    fingerprint: str
    """Names everything that fixes the order of samples."""
    next_sample: NonNegativeInt
    origin: Origin
    sources: dict[str, Position]
    """The position of each source. Those that the mixture had before and has no more are kept: they may come back."""


@dataclasses.dataclass(frozen=True)
class _Source:
    name: str
    samples: Windows | PackedRows
    order: str
    per_epoch: int
    """Samples that an epoch of it has."""


class Loader:
    """Iterates over batches of training samples, forever, from the global sample index `at` on.

    Sample g is a pure function of (`fingerprint`, g): rows, batch size, prefetch and the number of processes only
    choose which samples go into an array together.

    Args:
        cfg: what to read.
        batch_size: rows of the global batch.
        rows: the numbers of those rows of it that this process makes; all by default.
        at: a sample index, or the `state` of a loader to go on from.
        allow_data_change: take a state of other data or another mixture: a source whose own order is unchanged goes on
            where it was, also if it was away in between, any other starts from its beginning, with a warning, and the
            fingerprint is a new one.

    Raises DataError for a data set that is missing, damaged, or not the one of the state; for sources of different
    tokenizers; ConfigError for a config without sources.
    """

    def __init__(
        self,
        cfg: DataConfig,
        *,
        batch_size: int,
        rows: np.ndarray | None = None,
        at: Mapping[str, Any] | int = 0,
        allow_data_change: bool = False,
    ):
        self._cfg = cfg
        self.batch_size = batch_size
        self._rows = np.arange(batch_size) if rows is None else rows
        self._sources = _open_sources(cfg)
        given = [cfg.sources[source.name].weight for source in self._sources]
        self._weights = tuple(MIXTURES[cfg.mixture](given, [source.samples.n_tokens for source in self._sources]))
        state = at if isinstance(at, int) else _checked_state(at)
        self.next_sample, self._origin = self._resume(state, allow_data_change)
        known = {} if isinstance(state, int) else state["sources"]
        self._away = {name: position for name, position in known.items() if name not in cfg.sources}
        self.fingerprint = self._fingerprint(self._origin)
        self._mixture = Mixture(
            self._weights,
            self._origin["sample"],
            [self._origin["cursors"][source.name] for source in self._sources],
            self._origin.get("resolution", SHORTEST),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `at` on; batch i holds samples `at + i * batch_size` and following."""
        import grain

        group = max(1, _ELEMENT_TOKENS // (len(self._rows) * self._cfg.seq_len))
        ahead = -(-self._cfg.prefetch // group)
        options = grain.ReadOptions(num_threads=min(1, ahead), prefetch_buffer_size=ahead)
        for element in grain.MapDataset.source(_BatchGroups(self, group)).to_iter_dataset(options):
            if isinstance(element, DataError):
                raise element
            yield from element

    def batches(self, first: int, count: int) -> list[Batch]:
        """This process's rows of the `count` batches from sample `first` on. Raises DataError for damaged data."""
        firsts = first + np.arange(count) * self.batch_size
        samples = (firsts[:, None] + self._rows).ravel()
        tokens_BU, segments_BU, *weights = self._read(samples)
        whole = as_batch(tokens_BU, segments_BU, samples, self._cfg.documents, *weights)
        columns = [getattr(whole, field.name) for field in dataclasses.fields(Batch)]
        bounds = ((low, low + len(self._rows)) for low in range(0, len(samples), len(self._rows)))
        return [Batch(*(None if x is None else x[low:high] for x in columns)) for low, high in bounds]

    def _read(self, samples: np.ndarray) -> tuple[np.ndarray, ...]:
        """The rows of these samples, as their sources have them: tokens, segments and perhaps weights."""
        source, cursor = self._mixture.locate(samples)
        if len(self._sources) == 1:
            return self._sources[0].samples.read(cursor)
        columns: list[np.ndarray] = []
        for index in np.unique(source):
            rows = source == index
            found = self._sources[index].samples.read(cursor[rows])
            columns = columns or [np.empty((len(samples), *x.shape[1:]), x.dtype) for x in found]
            for column, x in zip(columns, found, strict=True):
                column[rows] = x
        return tuple(columns)

    def state(self, next_sample: int) -> LoaderState:
        """What to store so that a loader goes on with sample `next_sample`, at any batch size."""
        cursors = self._mixture.cursors(next_sample)
        return LoaderState(
            fingerprint=self.fingerprint,
            next_sample=next_sample,
            origin=self._origin,
            sources=self._away
            | {
                source.name: Position(order=source.order, cursor=cursor)
                for source, cursor in zip(self._sources, cursors, strict=True)
            },
        )

    def epoch(self, next_sample: int) -> dict[str, float]:
        """How often each source was seen, by name, when the samples before `next_sample` are done."""
        cursors = self._mixture.cursors(next_sample)
        return {source.name: cursor / source.per_epoch for source, cursor in zip(self._sources, cursors, strict=True)}

    def recorded(self, batch: Batch) -> np.ndarray:
        """The array that the ledger keeps checksums of, int32 [B, T]."""
        return batch.tokens_BT

    def _fingerprint(self, origin: Origin) -> str:
        content = {
            "order": _ORDER,
            "documents": self._cfg.documents,
            "origin": origin,
            "sources": {
                source.name: [source.order, weight] for source, weight in zip(self._sources, self._weights, strict=True)
            },
        }
        return files.hash_bytes(json.dumps(content, sort_keys=True).encode())

    def _resume(self, at: LoaderState | int, allow_data_change: bool) -> tuple[int, Origin]:
        """The sample to go on with, and the mixture's origin."""
        if isinstance(at, int):
            return at, self._new_origin(0, {source.name: 0 for source in self._sources})
        origin, next_sample = at["origin"], at["next_sample"]
        same_sources = origin["cursors"].keys() == {source.name for source in self._sources}
        found = self._fingerprint(origin)
        if same_sources and found == at["fingerprint"]:
            return next_sample, origin
        if not allow_data_change:
            raise DataError(
                f"the data is not what this run was trained on: fingerprint {found[:16]} now, "
                f"{at['fingerprint'][:16]} then (data set, seed, seq_len, documents, mixture or weights); "
                "restore it, or go on with other data by --allow-data-change"
            )
        cursors = {source.name: _carried_cursor(source, at["sources"]) for source in self._sources}
        return next_sample, self._new_origin(next_sample, cursors)

    def _new_origin(self, sample: int, cursors: dict[str, int]) -> Origin:
        resolution = close_resolution(self._weights)
        origin = Origin(sample=sample, cursors=cursors)
        return origin if resolution == SHORTEST else {**origin, "resolution": resolution}


def _checked_state(at: Mapping[str, Any]) -> LoaderState:
    try:
        return pydantic.TypeAdapter(LoaderState).validate_python(at, strict=True)
    except pydantic.ValidationError as error:
        raise CheckpointError(
            f"the checkpoint does not say where its run was in the data: {first_problem(error)}; use another step"
        ) from None


class _BatchGroups:
    """The loader as Grain wants it: by random access, `group` consecutive batches as one element.

    An error is an element too, because Grain would put one of its own in its place.
    """

    def __init__(self, loader: Loader, group: int):
        self._loader = loader
        self._group = group

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> list[Batch] | DataError:
        first = self._loader.next_sample + int(index) * self._group * self._loader.batch_size
        try:
            return self._loader.batches(first, self._group)
        except DataError as error:
            return error


def _carried_cursor(source: _Source, positions: Mapping[str, Position]) -> int:
    """Where the source goes on: where it was, if it is the same. Says so if it is not."""
    position = positions.get(source.name)
    if position is None:
        return 0
    if position["order"] != source.order:
        logger.warning("data.sources.%s is not what it was: it starts from its beginning", source.name)
        return 0
    return position["cursor"]


def _open_sources(cfg: DataConfig) -> list[_Source]:
    """The sources in order of their names, which a reordered config does not change."""
    datasets = open_sources(cfg, verify=cfg.verify == "full")
    return [_source(cfg, name, dataset) for name, dataset in sorted(datasets.items())]


def _source(cfg: DataConfig, name: str, dataset: Dataset) -> _Source:
    split: TokenSplit = dataset.split("train")
    limit = cfg.sources[name].tokens
    if limit is not None and limit > split.n_tokens:
        raise DataError(
            f"data.sources.{name}.tokens={limit:,} is more than the {split.n_tokens:,} of {cfg.sources[name].path}; "
            "ask for fewer, or for all: None"
        )
    if split.n_scored is not None and cfg.documents != "whole":
        raise DataError(
            f"data.sources.{name}: {cfg.sources[name].path} holds conversations, of which only some tokens are scored, "
            f"and data.documents={cfg.documents} would cut them and score all; set task=instruct and "
            "data.documents=whole"
        )
    named = [_ORDER, split.hash, cfg.seq_len, cfg.seed, *([] if limit is None else [limit])]
    if cfg.documents == "whole":
        packed = PackedRows(split, cfg.seq_len, cfg.seed, limit)
        return _Source(name, packed, _named([*named, "whole"]), packed.n_rows)
    windows = Windows(split, cfg.seq_len, cfg.seed, cfg.documents, limit)
    return _Source(name, windows, _named(named), windows.n_windows)


def _named(what: list[Any]) -> str:
    return files.hash_bytes(json.dumps(what).encode())
