"""From the files of the sources to chunks of documents of about equal size."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from lmjax.data.config import PrepareConfig
from lmjax.data.curate.document import Document
from lmjax.data.curate.recipe import CurateConfig
from lmjax.data.curate.step import DocumentStep
from lmjax.data.curate.warc import read_warc
from lmjax.data.prepare.corpus import Omitted
from lmjax.data.prepare.sources import READERS, InputFile, Readers, Report, list_inputs, read_documents, read_text
from lmjax.errors import DataError

Files = dict[str, tuple[InputFile, ...]]


def _readers(cfg: CurateConfig) -> Readers:
    further = dict.fromkeys((".html", ".htm", *cfg.text_suffixes), read_text)
    return READERS | further | {".warc": read_warc, ".warc.gz": read_warc}


class Inputs(NamedTuple):
    """What a recipe reads."""

    sources: Files
    others: tuple[InputFile, ...]
    """What its steps read besides."""

    @property
    def all(self) -> list[InputFile]:
        """Every file."""
        return [*(file for files in self.sources.values() for file in files), *self.others]


def list_files(cfg: CurateConfig) -> Inputs:
    """The files of the recipe. Raises DataError for a source without any, and for a file in two of them."""
    files = {name: list_inputs(patterns, _readers(cfg)) for name, patterns in cfg.sources.items()}
    owner: dict[str, str] = {}
    for source, found in files.items():
        for file in found:
            if owner.setdefault(file.name, source) != source:
                raise DataError(f"{file.name} is in the sources {owner[file.name]} and {source}; take it out of one")
    steps = [step for _, step in cfg.parsed() if isinstance(step, DocumentStep)]
    others = [pattern for step in steps for pattern in step.inputs()]
    return Inputs(files, list_inputs(others, READERS | {".classifier": read_text}))


def chunks(cfg: CurateConfig, files: Files, report: Report, omitted: Omitted) -> Iterator[list[Document]]:
    """The documents in order, in lists that are closed with the one that brings them to `chunk_bytes` of text.

    A document is named by its source, file and place, so that the result does not depend on where the files lie. Those
    that are not UTF-8 where the recipe says to skip them, and those without any text, are left out.
    """
    batch: list[Document] = []
    size = 0
    for document in _documents(cfg, files, report, omitted):
        batch.append(document)
        size += document.size
        if size >= cfg.chunk_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _documents(cfg: CurateConfig, files: Files, report: Report, omitted: Omitted) -> Iterator[Document]:
    reading = PrepareConfig(
        text_key=cfg.text_key,
        document_separator=cfg.document_separator,
        document_bytes=cfg.document_bytes,
        invalid_utf8=cfg.invalid_utf8,
    )
    for source, found in files.items():
        named = [file._replace(name=f"{source}/{_utf8(file.path.name)}") for file in found]
        for document in read_documents(named, reading, report, _readers(cfg)):
            if document.text is None:
                omitted.invalid += 1
            elif document.text.strip():
                yield Document(document.text, document.name, source)
            else:
                omitted.empty += 1


def _utf8(name: str) -> str:
    """A name of a file, which need not be UTF-8."""
    return os.fsencode(name).decode("utf-8", errors="replace")
