"""What a teacher says of training samples, stored once: the K likeliest next tokens at every place, and how likely.

A sample is what a loader of one fingerprint reads under one number (data/loader.py), so that what is stored fits the
windows that training reads: the same text, cut at the same places, in any epoch. A directory holds

- `00000.tokens`, ...: uint16 or uint32 [samples, T, K], the likeliest first
- `00000.logp`, ...: float16 [samples, T, K + 1], their log-probabilities and that of all other tokens together
- `teacher.json`: of which samples, by which teacher, with hashes; sealed with its own

Files are little endian. The last is written anew behind every file, so that what is interrupted goes on, and what
is too little is continued.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import flax.struct
import numpy as np
import pydantic
from etils import epath
from pydantic import Field

from lmjax.data.batch import Batch
from lmjax.data.store.manifest import Hash
from lmjax.data.store.shards import token_dtype
from lmjax.devices.rows import axes
from lmjax.errors import DataError
from lmjax.losses import Likeliest
from lmjax.record import files, formats
from lmjax.schema import PositiveFloat, PositiveInt, config_class, first_problem
from lmjax.tasks.task import MakeSource, Source

FORMAT = 1
FILE = "teacher.json"


@config_class
class Piece:
    """Two files."""

    samples: PositiveInt
    tokens_hash: Hash
    logp_hash: Hash


@config_class
class StoreManifest:
    """What a directory holds: the samples from 0 on, piece by piece."""

    source: Hash
    """The fingerprint of the loader whose samples they are."""
    teacher: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """The hash of its weights."""
    temperature: PositiveFloat
    seq_len: PositiveInt
    vocab: PositiveInt
    top: PositiveInt
    """K."""
    piece_samples: PositiveInt
    """Samples of every piece but the last."""
    pieces: tuple[Piece, ...] = ()

    @property
    def samples(self) -> int:
        return sum(piece.samples for piece in self.pieces)

    @property
    def fingerprint(self) -> str:
        """Names what is said of any sample, however many there are."""
        return _hash({name: value for name, value in dataclasses.asdict(self).items() if name != "pieces"})

    def sizes(self, number: int) -> dict[str, tuple[np.dtype, tuple[int, int, int], str]]:
        """File name -> type, shape and hash of each of a piece's files."""
        piece, name = self.pieces[number], f"{number:05d}"
        places = piece.samples, self.seq_len
        return {
            f"{name}.tokens": (np.dtype(token_dtype(self.vocab)), (*places, self.top), piece.tokens_hash),
            f"{name}.logp": (np.dtype(np.float16), (*places, self.top + 1), piece.logp_hash),
        }


class Store:
    """A directory of what a teacher said, opened for reading.

    Raises DataError for a manifest that is missing or damaged, and files that are missing or of another size. A piece
    is compared with its hashes when it is first read.
    """

    def __init__(self, directory: epath.Path):
        self.directory, self.manifest = directory, read_manifest(directory)
        for number in range(len(self.manifest.pieces)):
            for name, (dtype, shape, _) in self.manifest.sizes(number).items():
                if not files.has_size(directory / name, expected := int(np.prod(shape)) * dtype.itemsize):
                    raise DataError(
                        f"{directory / name} is missing or not of {expected} bytes; restore it or run lmjax teach again"
                    )
        self._piece = functools.lru_cache(maxsize=2)(self._read_piece)

    def read(self, samples: np.ndarray) -> Likeliest:
        """What was said of these samples (int64 [B]): int32 tokens and float32 log-probabilities.

        Raises DataError for damage, and for a sample that is not there.
        """
        manifest = self.manifest
        if samples.max() >= manifest.samples:
            raise DataError(
                f"{self.directory} holds the first {manifest.samples:,} samples, and the run reads sample "
                f"{samples.max():,}; continue it by lmjax teach --samples"
            )
        tokens_BTK = np.empty((len(samples), manifest.seq_len, manifest.top), np.int32)
        logp_BTJ = np.empty((len(samples), manifest.seq_len, manifest.top + 1), np.float32)
        pieces, places = np.divmod(samples, manifest.piece_samples)
        for number in np.unique(pieces).tolist():
            mine = pieces == number
            tokens, logp = self._piece(number)
            tokens_BTK[mine], logp_BTJ[mine] = tokens[places[mine]], logp[places[mine]]
        return Likeliest(tokens_BTK, logp_BTJ)

    def verify(self) -> None:
        """Compare every piece with its hashes. Raises DataError for the first that is damaged."""
        for number in range(len(self.manifest.pieces)):
            self._read_piece(number)

    def _read_piece(self, number: int) -> list[np.ndarray]:
        found = []
        for name, (dtype, shape, expected) in self.manifest.sizes(number).items():
            content = files.read_bytes(self.directory / name)
            if files.hash_bytes(content) != expected:
                raise DataError(f"{self.directory / name} is damaged: its hash is not the manifest's; restore it")
            found.append(np.frombuffer(content, dtype).reshape(shape))
        return found


def write_piece(directory: epath.Path, manifest: StoreManifest, said: Likeliest) -> StoreManifest:
    """Append samples, whose arrays are of one piece, and return the manifest with it, which is written, too."""
    tokens = np.asarray(said.tokens_BTK, token_dtype(manifest.vocab)).tobytes()
    logp = np.asarray(said.logp_BTJ, np.float16).tobytes()
    piece = Piece(samples=len(said.tokens_BTK), tokens_hash=files.hash_bytes(tokens), logp_hash=files.hash_bytes(logp))
    manifest = dataclasses.replace(manifest, pieces=(*manifest.pieces, piece))
    names = manifest.sizes(len(manifest.pieces) - 1)
    for name, content in zip(names, (tokens, logp), strict=True):
        files.write_bytes(directory / name, content)
    listed = formats.stamp(FORMAT) | dataclasses.asdict(manifest)
    files.write_bytes(directory / FILE, json.dumps(listed | {"seal": _hash(listed)}, indent=1).encode())
    return manifest


def read_manifest(directory: epath.Path) -> StoreManifest:
    """Raises DataError for none, and for one that is not as it was written."""
    path = directory / FILE
    with files.reporting(path):
        if not path.exists():
            raise DataError(f"{directory} holds nothing that a teacher said (no {FILE}); run lmjax teach first")
    try:
        content = json.loads(files.read_bytes(path))
        if content.pop("seal") != _hash(content):
            raise ValueError("its content is not what was sealed")
        return StoreManifest(**formats.unstamped(content, path, FORMAT, DataError))
    except DataError:
        raise
    except pydantic.ValidationError as error:
        raise DataError(f"{path} is not what lmjax teach writes: {first_problem(error)}; run it again") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); restore it or run lmjax teach again") from error


def _hash(content: Mapping[str, Any]) -> str:
    return files.hash_bytes(json.dumps(content, sort_keys=True).encode())


# In training ------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class TaughtBatch(Batch):
    """A batch with what a teacher said of it."""

    likeliest_BTK: Any = axes("batch time likeliest", default=None)
    """int32 tokens."""
    logp_BTJ: Any = axes("batch time likeliest", default=None)
    """float32, their log-probabilities and that of all others."""


class TaughtSource:
    """A source whose batches bring what is stored of their samples.

    Raises DataError for a store of other samples than the source's, or another than a saved state was of.
    """

    def __init__(
        self,
        source: MakeSource,
        store: Store,
        batch_size: int,
        *,
        rows: np.ndarray,
        at: Mapping[str, Any] | int,
        allow_data_change: bool = False,
    ):
        self._store, self._rows, self._batch_size = store, rows, batch_size
        stored = store.manifest.fingerprint
        if not isinstance(at, int):
            at = dict(at)
            if at.pop("stored", None) != stored and not allow_data_change:
                raise DataError(
                    f"{store.directory} is not what this run was taught by; restore that, or go on with this by "
                    "--allow-data-change"
                )
        self._source: Source = source(rows=rows, at=at, allow_data_change=allow_data_change)
        self.fingerprint, self.next_sample = self._source.fingerprint, self._source.next_sample
        if self.fingerprint != store.manifest.source:
            raise DataError(
                f"{store.directory} is of other samples than this run's (data set, data.seed, seq_len, documents or "
                "mixture); run lmjax teach with this config"
            )

    def __iter__(self) -> Iterator[TaughtBatch]:
        first = self.next_sample
        for batch in self._source:
            said = self._store.read(first + self._rows)
            yield TaughtBatch(**vars(batch), likeliest_BTK=said.tokens_BTK, logp_BTJ=said.logp_BTJ)
            first += self._batch_size

    def state(self, next_sample: int) -> Mapping[str, Any]:
        return {**self._source.state(next_sample), "stored": self._store.manifest.fingerprint}

    def epoch(self, next_sample: int) -> Mapping[str, float]:
        return self._source.epoch(next_sample)

    def recorded(self, batch: Any) -> np.ndarray:
        return self._source.recorded(batch)
