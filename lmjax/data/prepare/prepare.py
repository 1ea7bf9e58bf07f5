"""From text to a prepared data set: `prepare(recipe, directory)`.

The directory is finished when it holds a manifest, which is written last. Until then `preparing/` holds the recipe and
a record of each finished shard; a run that was killed goes on after the last of them, and its result is the same byte
for byte. One that fails before its first shard leaves nothing behind. Nothing is written over or deleted in a directory
but what these records say was made by this recipe.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from lmjax.data.chat.templates import Template, find_template, load_template, save_template
from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.prepare import records
from lmjax.data.prepare.clean import describe
from lmjax.data.prepare.corpus import (
    Division,
    Omitted,
    Split,
    Text,
    curation_of,
    documents_needed,
    fingerprint_of,
    read_corpus,
    sample_passages,
)
from lmjax.data.prepare.encoding import DocumentError, Encoded, One, encode_batches
from lmjax.data.prepare.progress import Progress, showing
from lmjax.data.prepare.sources import InputFile, list_inputs
from lmjax.data.prepare.writer import Writer
from lmjax.data.store.manifest import FILE, Manifest, SplitManifest, read_manifest, write_manifest
from lmjax.data.store.shards import TOKENIZER, token_dtype, unlisted
from lmjax.data.tokenizers.load import load_tokenizer, train_tokenizer
from lmjax.data.tokenizers.pieces import VocabularyError
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import DataError
from lmjax.record.files import locate, reporting, write_bytes

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
    if not differing and cfg.chat is not None:
        with contextlib.suppress(DataError):  # it need not be there any more, either
            changed = _template(cfg, directory).hash != manifest.template_hash
            differing = f"the chat template {cfg.chat.template} changed since" if changed else ""
    if differing:
        raise DataError(
            f"{directory} was prepared differently: {differing}; use a new directory (lmjax train: "
            "data.sources.NAME.path) or delete this one"
        )
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
    curations = _curations(files)
    recipe = records.begin_or_continue(cfg, directory, files)
    how: Division = recipe["division"]
    tokenizer = _tokenizer(cfg, directory, files, how)
    writers = {
        split: Writer(directory, split, cfg.shard_tokens, tokenizer.vocab_size, scores=cfg.chat is not None)
        for split in _SPLITS
    }
    omitted = Omitted()
    with showing(sum(file.size for file in files), progress) as shown:
        _encode(cfg, directory, files, how, writers, omitted, shown)
    _check_splits(cfg, writers)
    for writer in writers.values():
        writer.close()
    template_hash = None if cfg.chat is None else load_template(directory / TOKENIZER).hash
    manifest = Manifest(
        dtype=token_dtype(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        endoftext_id=tokenizer.endoftext_id,
        normalization=describe(cfg),
        empty_documents=omitted.empty,
        invalid_documents=omitted.invalid,
        unknown_documents=sum(writer.unknown for writer in writers.values()),
        template_hash=template_hash,
        curations=curations,
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


def _curations(files: tuple[InputFile, ...]) -> tuple[str, ...]:
    """The fingerprints of the curations that made the files. Raises DataError for one that is not as it was written."""
    records = dict.fromkeys(path for path in map(curation_of, files) if path is not None)
    return tuple(map(fingerprint_of, records))


def _tokenizer(cfg: PrepareConfig, directory: epath.Path, files: tuple[InputFile, ...], how: Division) -> Tokenizer:
    """The tokenizer of an interrupted run, or one made now, saved in the directory."""
    home = directory / TOKENIZER
    marker = directory / records.FOLDER / records.TOKENIZER_DONE
    if not marker.exists():
        texts = read_corpus(files, cfg, how, _ignore, Omitted())
        learns = cfg.tokenizer.learns
        sample = (
            sample_passages(texts, cfg.tokenizer.sample_bytes, cfg.seed) if learns else (item.text for item in texts)
        )
        _train_tokenizer(cfg.tokenizer, list(sample) if learns else sample).save(home)
        if cfg.chat is not None:
            save_template(_template(cfg, directory), _origin(cfg, directory), home)
        write_bytes(marker, b"{}")
    tokenizer = load_tokenizer(home)
    if cfg.tokenizer.kind == "file" and train_tokenizer(cfg.tokenizer, ()).hash != tokenizer.hash:
        raise DataError(f"{cfg.tokenizer.path} changed since {directory} was begun; delete that directory")
    if cfg.chat is not None and _template(cfg, directory).hash != load_template(home).hash:
        raise DataError(
            f"the chat template {cfg.chat.template} changed since {directory} was begun; delete that directory"
        )
    return tokenizer


def _train_tokenizer(cfg: TokenizerConfig, sample: Iterable[str]) -> Tokenizer:
    """The tokenizer; where the sample is too short for so many tokens, of as many as it can give, which is said."""
    try:
        return train_tokenizer(cfg, sample)
    except VocabularyError as error:
        print(f"note: {error}, and so many it is", file=sys.stderr)
        return train_tokenizer(dataclasses.replace(cfg, vocab=error.most), sample)


def _template(cfg: PrepareConfig, directory: epath.Path) -> Template:
    """The chat template that the recipe asks for."""
    assert cfg.chat is not None
    return find_template(cfg.chat.template, _origin(cfg, directory), directory / TOKENIZER)


def _origin(cfg: PrepareConfig, directory: epath.Path) -> epath.Path:
    """The directory that the tokenizer came from."""
    given = directory / TOKENIZER if cfg.tokenizer.path is None else locate(cfg.tokenizer.path)
    return given if given.is_dir() else given.parent


def _ignore(n_bytes: int) -> None:
    pass


def _encode(
    cfg: PrepareConfig,
    directory: epath.Path,
    files: tuple[InputFile, ...],
    how: Division,
    writers: dict[Split, Writer],
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
        workers = cfg.workers or _cpu_count()
        for encoded in encode_batches(directory / TOKENIZER, batches(), workers, cfg.unknown, cfg.chat):
            batch = waiting.pop(0)
            _write(batch, encoded, writers)
            progress.encoded(len(batch), len(encoded.tokens))
    except DocumentError as error:
        hint = "" if cfg.chat else "; or set prepare.unknown (lmjax prepare: --unknown) to replace or skip"
        raise DataError(f"{waiting[0][error.index].name}: {error}{hint}") from error


def _unfinished(texts: Iterator[Text], writers: dict[Split, Writer]) -> Iterator[Text]:
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


def _write(batch: list[Text], encoded: Encoded, writers: dict[Split, Writer]) -> None:
    ends = np.cumsum(encoded.n_tokens)
    for index, item in enumerate(batch):
        mine = slice(ends[index] - encoded.n_tokens[index], ends[index])
        exact, unknown, truncated = (
            bool(flags[index]) for flags in (encoded.exact, encoded.unknown, encoded.truncated)
        )
        document = One(
            encoded.tokens[mine], encoded.weights[mine], int(encoded.n_bytes[index]), exact, unknown, truncated
        )
        writers[item.split].add(document)


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    if truncated := sum(split.truncated_documents for split in manifest.splits.values()):
        assert cfg.chat is not None
        print(
            f"note: {truncated} of {total} conversations were cut at their {cfg.chat.too_long} to "
            f"{cfg.chat.longest} tokens",
            file=sys.stderr,
        )
    if how == "tails":
        print(
            f"note: too few documents to draw some for validation (sure from {documents_needed(cfg.valid_fraction)}): "
            f"the last {cfg.valid_fraction:.1%} of each are it",
            file=sys.stderr,
        )


def _check_splits(cfg: PrepareConfig, writers: dict[Split, Writer]) -> None:
    counts = {split: writer.count for split, writer in writers.items()}
    total = sum(counts.values())
    if total == 0:
        raise DataError(f"no text in {', '.join(cfg.inputs)}: every document is empty or was skipped")
    if counts["train"] == 0:
        raise DataError(f"no training documents: prepare.valid_fraction={cfg.valid_fraction} took all {total}")
    if counts["valid"] == 0 and cfg.valid_fraction > 0:
        raise DataError(
            f"none of the {total} documents fell to validation at prepare.valid_fraction={cfg.valid_fraction}: raise "
            f"it (sure from {documents_needed(cfg.valid_fraction)} documents)"
            + (", or 0 for none" if cfg.chat else ", or use prepare.split=tail for one text")
        )
