"""From text to a prepared data set: `prepare(recipe, directory)`.

The directory is finished when it holds a manifest, which is written last. Until then `preparing/` holds the recipe and
a record of each finished shard; a run that was killed goes on after the last of them, and its result is the same byte
for byte. One that fails before its first shard leaves nothing behind. Nothing is written over or deleted in a directory
but what these records say was made by this recipe.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.prepare import records
from lmjax.data.prepare.clean import describe
from lmjax.data.prepare.corpus import Division, Omitted, Split, Text, documents_needed, read_corpus, sample_passages
from lmjax.data.prepare.encoding import DocumentError, Encoded, encode_batches
from lmjax.data.prepare.progress import Progress, showing
from lmjax.data.prepare.sources import InputFile, list_inputs
from lmjax.data.store.manifest import (
    FILE,
    Manifest,
    ShardManifest,
    SplitManifest,
    as_json,
    read_manifest,
    write_manifest,
)
from lmjax.data.store.shards import TOKENIZER, shard_files, shard_sizes, token_dtype, unlisted, write_shard
from lmjax.data.tokenizers.load import load_tokenizer, train_tokenizer
from lmjax.data.tokenizers.pieces import VocabularyError
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import DataError
from lmjax.process.faults import fault
from lmjax.record.files import has_size, hash_file, locate, read_bytes, reporting, write_bytes

_SPLITS: tuple[Split, ...] = ("train", "valid")
_BATCH_CHARS = 1 << 20  # what one request to a worker holds at least


def prepare(cfg: PrepareConfig, path: str | os.PathLike[str], *, progress: bool = True) -> Manifest:
    """Make the data set that the recipe describes in the directory `path`, or finish making it.

    A finished directory of the same recipe is left alone. Raises DataError for one of another recipe, finished or not
    (naming what differs), for one that holds files of others under the names that are to be written, for bad input
    (naming file and place), and for a disk that is full.
    """
    directory = locate(path)
    if (directory / FILE).exists():
        return _finished(cfg, directory)
    files = list_inputs(cfg.inputs)
    _check_given_tokenizer(cfg)
    with reporting(directory, "write"), records.folder(directory):
        if (directory / FILE).exists():  # another process made it while this one waited
            return _finished(cfg, directory)
        return _make(cfg, directory, files, progress)


def _finished(cfg: PrepareConfig, directory: epath.Path) -> Manifest:
    """The manifest, if it is of this recipe. The inputs need not exist any more, but must not have changed."""
    manifest = read_manifest(directory)
    try:
        files = list_inputs(cfg.inputs)
    except DataError:
        files = None
    wanted = records.recipe_of(cfg, files or ())
    if files is None:
        wanted["files"] = manifest.recipe.get("files")
    differing = records.difference(manifest.recipe, wanted, files or ()) or records.edited(manifest.recipe, files or ())
    if not differing and cfg.tokenizer.path is not None and locate(cfg.tokenizer.path).exists():
        changed = train_tokenizer(cfg.tokenizer, ()).hash != manifest.tokenizer_hash
        differing = f"{cfg.tokenizer.path} changed since" if changed else ""
    if differing:
        raise DataError(f"{directory} was prepared differently: {differing}; use a new directory or delete this one")
    return manifest


def _check_given_tokenizer(cfg: PrepareConfig) -> None:
    """Raises DataError, before any text is read, for a tokenizer file that is not there or cannot do what is asked."""
    if cfg.tokenizer.kind == "file":
        tokenizer = train_tokenizer(cfg.tokenizer, ())
        if cfg.unknown == "replace" and tokenizer.unknown_id is None:
            raise DataError(f"prepare.unknown=replace: {cfg.tokenizer.path} has no symbol for the unknown; use skip")
        if cfg.unknown == "replace" and tokenizer.unknown_id == tokenizer.endoftext_id:
            raise DataError(
                f"prepare.unknown=replace: in {cfg.tokenizer.path} {tokenizer.endoftext!r} stands for the unknown, "
                "too, and would end documents where they go on; use skip, or name another tokenizer.endoftext"
            )


# Making ---------------------------------------------------------------------------------------------------------------


def _make(cfg: PrepareConfig, directory: epath.Path, files: tuple[InputFile, ...], progress: bool) -> Manifest:
    recipe = records.begin_or_continue(cfg, directory, files)
    how: Division = recipe["division"]
    tokenizer = _tokenizer(cfg, directory, files, how)
    writers = {split: _Writer(directory, split, cfg.shard_tokens, tokenizer.vocab_size) for split in _SPLITS}
    omitted = Omitted()
    with showing(sum(file.size for file in files), progress) as shown:
        _encode(cfg, directory, files, how, writers, omitted, shown)
    _check_splits(cfg, writers)
    for writer in writers.values():
        writer.close()
    manifest = Manifest(
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        endoftext_id=tokenizer.endoftext_id,
        normalization=describe(cfg),
        empty_documents=omitted.empty,
        invalid_documents=omitted.invalid,
        unknown_documents=sum(writer.unknown for writer in writers.values()),
        splits={split: SplitManifest.of(tuple(writer.shards)) for split, writer in writers.items() if writer.shards},
        recipe=recipe,
    )
    records.check_unedited(recipe, directory, files)
    for path in unlisted(directory, manifest):
        path.unlink()  # of a beginning that had not come to a shard when it was given up
    write_manifest(manifest, directory)
    if progress:
        _say_what_was_done(manifest, cfg, how)
    records.remove(directory)
    return manifest


def _tokenizer(cfg: PrepareConfig, directory: epath.Path, files: tuple[InputFile, ...], how: Division) -> Tokenizer:
    """The tokenizer of an interrupted run, or one made now, saved in the directory."""
    home = directory / TOKENIZER
    marker = directory / records.FOLDER / records.TOKENIZER_DONE
    if not marker.exists():
        texts = read_corpus(files, cfg, how, _ignore, Omitted())
        learns = cfg.tokenizer.kind in ("bpe", "unigram")
        sample = (
            sample_passages(texts, cfg.tokenizer.sample_bytes, cfg.seed) if learns else (item.text for item in texts)
        )
        _train_tokenizer(cfg.tokenizer, list(sample) if learns else sample).save(home)
        write_bytes(marker, b"{}")
    tokenizer = load_tokenizer(home)
    if cfg.tokenizer.kind == "file" and train_tokenizer(cfg.tokenizer, ()).hash != tokenizer.hash:
        raise DataError(f"{cfg.tokenizer.path} changed since {directory} was begun; delete that directory")
    return tokenizer


def _train_tokenizer(cfg: TokenizerConfig, sample: Iterable[str]) -> Tokenizer:
    """The tokenizer; where the sample is too short for so many tokens, of as many as it can give, which is said."""
    try:
        return train_tokenizer(cfg, sample)
    except VocabularyError as error:
        print(f"note: {error}, and so many it is", file=sys.stderr)
        return train_tokenizer(dataclasses.replace(cfg, vocab=error.most), sample)


def _ignore(n_bytes: int) -> None:
    pass


def _encode(
    cfg: PrepareConfig,
    directory: epath.Path,
    files: tuple[InputFile, ...],
    how: Division,
    writers: dict[Split, "_Writer"],
    omitted: Omitted,
    progress: Progress,
) -> None:
    """Encode every document that is not in a finished shard yet and hand it to the writer of its split."""
    waiting: list[list[Text]] = []  # batches that were sent but have not come back, oldest first

    def batches() -> Iterator[list[str]]:
        for batch in _batched(_unfinished(read_corpus(files, cfg, how, progress.read, omitted), writers)):
            waiting.append(batch)
            yield [item.text for item in batch]

    try:
        for encoded in encode_batches(directory / TOKENIZER, batches(), cfg.workers or _cpu_count(), cfg.unknown):
            batch = waiting.pop(0)
            _write(batch, encoded, writers)
            progress.encoded(len(batch), len(encoded.tokens))
    except DocumentError as error:
        raise DataError(
            f"{waiting[0][error.index].name}: {error}; "
            "or set prepare.unknown (lmjax prepare: --unknown) to replace or skip"
        ) from error


def _unfinished(texts: Iterator[Text], writers: dict[Split, "_Writer"]) -> Iterator[Text]:
    done = {split: writer.resumed for split, writer in writers.items()}
    for item in texts:
        if done[item.split]:
            done[item.split] -= 1
        else:
            yield item


def _batched(texts: Iterator[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    size = 0
    for item in texts:
        batch.append(item)
        size += len(item.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(batch: list[Text], encoded: Encoded, writers: dict[Split, "_Writer"]) -> None:
    ends = np.cumsum(encoded.n_tokens)
    for index, item in enumerate(batch):
        tokens = encoded.tokens[ends[index] - encoded.n_tokens[index] : ends[index]]
        unknown = bool(encoded.unknown[index])
        writers[item.split].add(tokens, int(encoded.n_bytes[index]), bool(encoded.exact[index]), unknown)


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Writer:
    """Collects the documents of one split and writes a shard whenever it is full."""

    def __init__(self, directory: epath.Path, split: Split, shard_tokens: int, vocab_size: int):
        self._directory = directory
        self._split = split
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(vocab_size)
        self.shards: list[ShardManifest] = []
        self.unknown = 0
        """Documents that the tokenizer cannot represent in full, those of the shards included."""
        self.resumed = 0
        """Documents that an interrupted run is done with."""
        self._resume()
        self._start_shard()

    def _start_shard(self) -> None:
        self._documents: list[np.ndarray] = []
        self._tokens = self._text_bytes = self._inexact = self._unknown = self._left_out = 0

    def add(self, tokens: np.ndarray, text_bytes: int, exact: bool, unknown: bool) -> None:
        """The next document, endoftext included; without any token it is left out, and counted."""
        self._unknown += unknown
        self.unknown += unknown
        if len(tokens) == 0:
            self._left_out += 1
            return
        self._documents.append(tokens)
        self._tokens += len(tokens)
        self._text_bytes += text_bytes
        self._inexact += not exact
        if self._tokens >= self._shard_tokens:
            self.close()

    @property
    def count(self) -> int:
        """Documents, those of the shards and those that wait for the next one."""
        return sum(shard.documents for shard in self.shards) + len(self._documents)

    def close(self) -> None:
        """Write what there is as a shard, its record last."""
        if not self._documents:
            return
        ends = np.cumsum([len(document) for document in self._documents])
        tokens = np.concatenate(self._documents)
        shard = write_shard(self._directory, self._name(), tokens, ends, self._text_bytes, self._inexact, self._unknown)
        record = json.loads(as_json(shard)) | {"left_out": self._left_out}
        write_bytes(self._record(shard.name), json.dumps(record, sort_keys=True).encode())
        self.shards.append(shard)
        self._start_shard()
        fault("prepare.shard")

    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):05d}"

    def _record(self, name: str) -> epath.Path:
        return self._directory / records.FOLDER / f"{name}.json"

    def _resume(self) -> None:
        """Take over the shards of an interrupted run, as long as their files are there in full."""
        while (record := self._record(self._name())).exists():
            values = json.loads(read_bytes(record))
            left_out = values.pop("left_out", 0)
            shard = ShardManifest(**values)
            if not self._is_intact(shard):
                break
            self.shards.append(shard)
            self.unknown += shard.unknown_documents
            self.resumed += shard.documents + left_out

    def _is_intact(self, shard: ShardManifest) -> bool:
        sizes = shard_sizes(shard, self._dtype)
        return all(
            has_size(self._directory / name, sizes[name]) and hash_file(self._directory / name) == digest
            for name, digest in shard_files(shard).items()
        )


def _say_what_was_done(manifest: Manifest, cfg: PrepareConfig, how: Division) -> None:
    """What was not as one might think, on stderr."""
    total = sum(split.documents for split in manifest.splits.values())
    if inexact := sum(split.inexact_documents for split in manifest.splits.values()):
        print(f"note: {inexact} of {total} documents decode to other text: the tokenizer is lossy", file=sys.stderr)
    if manifest.unknown_documents:
        what = "were left out" if cfg.unknown == "skip" else "hold its unknown symbol now"
        print(
            f"note: {manifest.unknown_documents} documents, which the tokenizer cannot represent in full, {what}; a "
            "tokenizer with byte fallback (kinds bpe and unigram have it) keeps every text",
            file=sys.stderr,
        )
    if how == "tails":
        print(
            f"note: too few documents to draw some for validation (sure from {documents_needed(cfg.valid_fraction)}): "
            f"the last {cfg.valid_fraction:.1%} of each are it",
            file=sys.stderr,
        )


def _check_splits(cfg: PrepareConfig, writers: dict[Split, _Writer]) -> None:
    counts = {split: writer.count for split, writer in writers.items()}
    total = sum(counts.values())
    if total == 0:
        raise DataError(f"no text in {', '.join(cfg.inputs)}: every document is empty or was skipped")
    if counts["train"] == 0:
        raise DataError(f"no training documents: prepare.valid_fraction={cfg.valid_fraction} took all {total}")
    if counts["valid"] == 0 and cfg.valid_fraction > 0:
        raise DataError(
            f"none of the {total} documents fell to validation at prepare.valid_fraction={cfg.valid_fraction}: raise "
            f"it (sure from {documents_needed(cfg.valid_fraction)} documents), or use prepare.split=tail for one text"
        )
