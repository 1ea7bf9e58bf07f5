"""The documents of a recipe, cleaned, and which of them are for validation."""

import dataclasses
import heapq
import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from etils import epath

from lmjax.data.config import PrepareConfig
from lmjax.data.prepare.clean import clean
from lmjax.data.prepare.sources import InputFile, Report, read_documents
from lmjax.data.tokenizers.sections import sections
from lmjax.errors import DataError
from lmjax.record.files import hash_file, read_bytes

Split = Literal["train", "valid"]


class Text(NamedTuple):
    """A document as it will be encoded."""

    name: str
    text: str
    split: Split


@dataclasses.dataclass
class Omitted:
    """Documents that were left out, filled in as a corpus is read."""

    empty: int = 0
    invalid: int = 0


Division = Literal["document", "tail", "tails", "files"]
"""How validation text is split off: whole documents, drawn; the tail of the one text; the tail of each text; or the
files that were written for validation."""


def division(files: tuple[InputFile, ...], cfg: PrepareConfig) -> Division:
    """What `cfg.split` comes to: where no document would fall to validation, or none to training, the tail of each,
    but not of a conversation.

    Raises DataError where some of the files were held out for validation, and others say nothing of it.
    """
    curated = [file for file in files if curation_of(file) is not None]
    if any(_held_out(file) for file in curated):
        if len(curated) < len(files):
            other = next(file for file in files if file not in curated)
            raise DataError(f"{curated[0].path.parent} brings its own validation documents, {other.name} does not: "
                            "curate both, or prepare each as a source of its own")  # fmt: skip
        return "files"
    if cfg.chat is not None or cfg.split == "tail" or not 0 < cfg.valid_fraction < 1:
        return cfg.split
    enough = documents_needed(cfg.valid_fraction)
    cleaned = _cleaned(files, cfg, lambda n_bytes: None, Omitted())
    found = sum(1 for _ in itertools.islice(cleaned, enough))
    drawn = next(validation_documents(cfg.seed, cfg.valid_fraction))
    return "document" if found > max(1, drawn) else "tails"


def read_corpus(
    files: tuple[InputFile, ...], cfg: PrepareConfig, how: Division, report: Report, omitted: Omitted
) -> Iterator[Text]:
    """The corpus in order. A document without any text is left out; white space counts as text.

    Raises DataError for `tail` on anything but one document.
    """
    cleaned = _cleaned(files, cfg, report, omitted)
    if how == "tail":
        yield from _tails(_only_one(cleaned), cfg.valid_fraction)
    elif how == "tails":
        yield from _tails(cleaned, cfg.valid_fraction)
    elif how == "files":
        for file in files:
            split: Split = "valid" if _held_out(file) else "train"
            yield from (Text(name, text, split) for name, text in _cleaned((file,), cfg, report, omitted))
    else:
        chosen = validation_documents(cfg.seed, cfg.valid_fraction)
        next_chosen = next(chosen)
        for index, (name, text) in enumerate(cleaned):
            yield Text(name, text, "valid" if index == next_chosen else "train")
            if index == next_chosen:
                next_chosen = next(chosen)


def curation_of(file: InputFile) -> epath.Path | None:
    """The record of the curation that made the file, if one did. Raises DataError for one that has not ended."""
    if not _CURATED.fullmatch(file.path.name):
        return None
    path = file.path.parent / "curation.json"
    if not path.exists() and (path.parent / "curating").exists():
        raise DataError(f"{path.parent} is a curation that has not ended; run lmjax curate again, then prepare it")
    return path if path.exists() else None


def fingerprint_of(record: epath.Path) -> str:
    """Of a curation. Raises DataError where its record or a file of it is damaged, or a file missing or not its own."""
    try:
        content = json.loads(read_bytes(record))
        hashes = {shard["name"]: shard["hash"] for shard in content["shards"]}
        fingerprint = content["fingerprint"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{record} is damaged ({error}); curate again into a new directory") from error
    there = {path.name: path for path in record.parent.iterdir() if _CURATED.fullmatch(path.name)}
    if missing := sorted(hashes.keys() - there.keys()):
        raise DataError(f"{record.parent} has lost {missing[0]}; restore it, or curate again into a new directory")
    if foreign := sorted(there.keys() - hashes.keys()):
        raise DataError(f"{record.parent} holds {foreign[0]}, which its curation has not made; take it away")
    for name, expected in hashes.items():
        if hash_file(there[name]) != expected:
            raise DataError(f"{there[name]} is not as it was curated; restore it, or curate again into a new directory")
    return fingerprint


_CURATED = re.compile(r"(train|valid)-\d{5}\.jsonl\.zst")


def _held_out(file: InputFile) -> bool:
    return file.path.name.startswith("valid-")


def validation_documents(seed: int, fraction: float) -> Iterator[int]:
    """The numbers of the documents drawn for validation: one out of each 1/fraction consecutive ones, ascending.

    Stratified rather than independent draws: the share is right for any length of corpus, and no document's place
    depends on how many come after it. Without end; a fraction of 0 gives none.
    """
    if fraction == 0:
        yield -1
        return
    rng = np.random.default_rng([seed, 0])
    for stratum in range(1 << 62):
        low, high = math.ceil(stratum / fraction), math.ceil((stratum + 1) / fraction)
        yield low + int(rng.random() * (high - low))


def _cleaned(
    files: tuple[InputFile, ...], cfg: PrepareConfig, report: Report, omitted: Omitted
) -> Iterator[tuple[str, str]]:
    for document in read_documents(files, cfg, report):
        if document.text is None:
            omitted.invalid += 1
        elif text := clean(document.text, cfg):
            yield document.name, text
        else:
            omitted.empty += 1


def _only_one(documents: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    first, second = next(documents, None), next(documents, None)
    if second is not None:
        raise DataError(f"prepare.split=tail takes one text, but {second[0]} follows; use prepare.split=document")
    if first is not None:
        yield first


def _tails(documents: Iterator[tuple[str, str]], fraction: float) -> Iterator[Text]:
    """Split each document: its first characters are for training, its last for validation."""
    for name, text in documents:
        cut = max(int(len(text) * (1 - fraction)), int(fraction < 1))
        parts: tuple[tuple[str, Split], ...] = ((text[:cut], "train"), (text[cut:], "valid"))
        yield from (Text(name, part, split) for part, split in parts if part)


def sample_passages(texts: Iterator[Text], limit_bytes: int, seed: int) -> list[str]:
    """A random sample of passages of the training documents, in their order, of at most `limit_bytes` of UTF-8.

    Every passage draws a number and the smallest win, so one pass is enough and memory stays near the limit.
    """
    rng = np.random.default_rng([seed, 1])
    passages = (part for item in texts if item.split == "train" for part in sections(item.text))
    heap: list[tuple[float, int, int, str]] = []  # largest draw first
    total = 0
    for index, passage in enumerate(passages):
        size = len(passage.encode("utf-8"))
        heapq.heappush(heap, (-rng.random(), index, size, passage))
        total += size
        while total > limit_bytes and len(heap) > 1:
            total -= heapq.heappop(heap)[2]
    return [passage for _, _, _, passage in sorted(heap, key=lambda entry: entry[1])]


def documents_needed(fraction: float) -> int:
    """How many documents it takes to be sure of one for validation."""
    return math.ceil(1 / fraction)
