"""From raw documents to a corpus: `curate(recipe, directory)`.

The directory is finished when it holds `curation.json`, which is written last; beside it lie the documents, in files
that `lmjax prepare` takes, and `curation.html`, a page for people. Until then `curating/` holds the recipe and what is
done; a run that was killed goes on after it, and its result is the same byte for byte, as it is with any number of
processes. Memory holds a few chunks for each process; while a pass decides, part of the keys of all documents, as many
as are sorted at a time, and some 100 bytes for each document.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from lmjax.data.curate import packages, report, result
from lmjax.data.curate.account import Account
from lmjax.data.curate.chunk import FOLDER, Chunk, gather_keys, load_learned, save_learned
from lmjax.data.curate.progress import Progress
from lmjax.data.curate.read import Inputs, chunks, list_files
from lmjax.data.curate.recipe import CurateConfig, choices
from lmjax.data.curate.result import FILE, PAGE, Curation, verified_curation
from lmjax.data.curate.stage import fit, plan
from lmjax.data.curate.step import CorpusStep, DocumentStep
from lmjax.data.curate.workers import RECIPE, Order, work
from lmjax.data.prepare.corpus import Omitted
from lmjax.data.prepare.sources import contents, stamps
from lmjax.data.tokenizers.load import load_tokenizer
from lmjax.errors import DataError
from lmjax.record.files import hash_bytes, is_remote, locate, locked, read_bytes, reporting, write_bytes

READ = "read"
PACKAGES = "packages"
DOCUMENTS_READ = "read.json"
_OURS = re.compile(rf"{re.escape(FILE)}|{re.escape(PAGE)}|(train|valid)-\d{{5}}\.jsonl\.zst")


def curate(cfg: CurateConfig, path: str | os.PathLike[str], *, progress: bool = True) -> Curation:
    """Take the documents of the recipe through its steps into the directory `path`, or finish doing so.

    A finished directory of the same recipe is left alone. Raises DataError for one of another recipe, finished or not,
    for one that holds files of others under the names that are to be written, for bad input (naming file and place),
    for a package that is not installed, and where nothing is left.
    """
    directory = locate(path)
    if is_remote(directory):
        raise DataError(f"{directory}: curate writes to a disk; put the result into the bucket when it is done")
    if (directory / FILE).exists():
        return _finished(cfg, directory, progress)
    inputs = list_files(cfg)
    untouched = stamps(inputs.all)
    recipe = choices(cfg) | {"contents": _contents(cfg, inputs)}
    recipe |= {PACKAGES: _versions(cfg)}
    folder, new = directory / FOLDER, not directory.exists()
    with reporting(folder, "write"):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if (directory / FILE).exists():  # another process made it while this one waited
            return _finished(cfg, directory, progress)
        _begin_or_continue(directory, recipe)
        try:
            with Progress(progress, [READ, *_stage_names(cfg)]) as shown:
                fit(folder, cfg.parsed())
                count = _read(cfg, folder, inputs, untouched, shown)
                return _make(cfg, directory, recipe, count, shown)
        except DataError:
            if not (folder / DOCUMENTS_READ).exists():  # nothing that is worth going on from
                shutil.rmtree(directory if new else folder)
            raise


def _contents(cfg: CurateConfig, inputs: Inputs) -> str:
    """A hash of all that is read."""
    files = contents(inputs.all)
    return files if cfg.tokenizer is None else hash_bytes(f"{files} {load_tokenizer(cfg.tokenizer).hash}".encode())


def _versions(cfg: CurateConfig) -> dict[str, str]:
    """Of all that the steps use, and another version of which may give another result."""
    found = packages.versions(step["step"] for step in cfg.steps)
    for _, step in cfg.parsed():
        found |= step.versions() if isinstance(step, DocumentStep) else {}
    return found


def _finished(cfg: CurateConfig, directory: epath.Path, progress: bool) -> Curation:
    """What is there, if it is whole and of this recipe. Its inputs need not exist any more, but must not be others."""
    curation = verified_curation(directory)
    wanted = choices(cfg) | {PACKAGES: curation.recipe.get(PACKAGES)}
    try:
        wanted["contents"] = _contents(cfg, list_files(cfg))
    except DataError:
        wanted["contents"] = curation.recipe["contents"]
    if differing := _difference(curation.recipe, wanted):
        raise DataError(f"{directory} was curated differently: {differing}; use a new directory or delete this one")
    if (directory / FOLDER).exists():  # it was killed when all that was left to do was this
        shutil.rmtree(directory / FOLDER, ignore_errors=True)
    if progress:
        print(f"note: {directory} was finished before, and its files are as they were written", file=sys.stderr)
    return curation


def _difference(was: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first choice in which two recipes differ; files may lie elsewhere than they did, if they are the same.

    What a recipe of an earlier version does not name has its default.
    """
    was = choices(CurateConfig(sources={"_": ("_",)}, steps=())) | was
    for place, (old, new) in enumerate(zip(was["steps"], wanted["steps"], strict=False)):
        if old != new:
            names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
            return f"steps[{place}] ({new['step']}): {', '.join(names)}"
    if len(was["steps"]) != len(wanted["steps"]):
        return f"it had {len(was['steps'])} steps, now {len(wanted['steps'])}"
    if was["contents"] != wanted["contents"] or [*was["sources"]] != [*wanted["sources"]]:
        return "the files of the sources, or of the steps, changed since"
    names = [name for name in wanted if name not in ("sources", "steps") and was.get(name) != wanted[name]]
    return f"{names[0]} was {was.get(names[0])!r}, now {wanted[names[0]]!r}" if names else ""


def _begin_or_continue(directory: epath.Path, recipe: dict[str, Any]) -> None:
    """Record the recipe, or see that it is that of the beginning that is there, made with the same packages."""
    path = directory / FOLDER / RECIPE
    if path.exists():
        if differing := _difference(json.loads(read_bytes(path)), recipe):
            raise DataError(f"{directory} holds a half-made curation of another recipe: {differing}; finish that one, "
                            "delete the directory, or use another")  # fmt: skip
        return
    foreign = [file.name for file in directory.iterdir() if _OURS.fullmatch(file.name)]
    foreign += [f"{FOLDER}/{file.name}" for file in path.parent.iterdir() if file.name not in ("lock", f"{RECIPE}.tmp")]
    if foreign:
        raise DataError(f"{directory} holds {min(foreign)}, which no curate has made there; use a new directory")
    write_bytes(path, json.dumps(recipe).encode())


# Making ---------------------------------------------------------------------------------------------------------------


def _make(cfg: CurateConfig, directory: epath.Path, recipe: dict[str, Any], count: int, shown: Progress) -> Curation:
    """Take `count` chunks of documents, which have been read, through the steps."""
    folder, steps = directory / FOLDER, cfg.parsed()
    processes = cfg.workers or _cpu_count()
    totals = _totals(_chunks(folder, 0, count))
    totals[0].facts |= json.loads(read_bytes(folder / DOCUMENTS_READ))["omitted"]
    for number, stage in enumerate(plan(steps), 1):
        _work(folder, number, count, processes, shown)
        for total, place in zip(_totals(_chunks(folder, number, count)), stage.all, strict=True):
            learned = load_learned(folder, place)
            assert learned is not None
            total.facts |= learned.facts
            totals.append(total)
        if not any(chunk.record()["documents"] for chunk in _chunks(folder, number, count)):
            raise DataError(f"no document is left after {totals[-1].step}: see {folder}; loosen the steps")
        if stage.keys is not None:
            _decide(folder, stage.keys, steps[stage.keys][1], _chunks(folder, number, count))
    if len(totals) > 1 and totals[1].tokens is not None:  # what the first step was given is what was read
        totals[0].tokens = [totals[1].tokens[0]] * 2
    last = _chunks(folder, len(plan(steps)), count)
    shards = result.write_shards(directory, (one for chunk in last for one in chunk.documents()), cfg.shard_bytes)
    curation = Curation(recipe=recipe, steps=totals, shards=shards)
    write_bytes(directory / PAGE, report.page(curation).encode())
    result.write_curation(directory, curation)
    shutil.rmtree(folder)
    return curation


def _stage_names(cfg: CurateConfig) -> Iterator[str]:
    """What each stage does, for the progress line."""
    names = [name for name, _ in cfg.parsed()]
    for stage in plan(cfg.parsed()):
        yield ", ".join(names[place] for place in stage.all)


def _read(cfg: CurateConfig, folder: epath.Path, inputs: Inputs, untouched: str, shown: Progress) -> int:
    """Write the documents as chunks of stage 0; gives how many. The record of the last says that all are there.

    Raises DataError where the stamps of the files are no longer `untouched`: then old text stands beside new.
    """
    done = folder / DOCUMENTS_READ
    if done.exists():
        return int(json.loads(read_bytes(done))["chunks"])
    (folder / "0").mkdir(exist_ok=True)
    omitted, count = Omitted(), 0
    shown.start(0, sum(file.size for found in inputs.sources.values() for file in found))
    for count, documents in enumerate(chunks(cfg, inputs.sources, shown.read, omitted), 1):
        chunk = Chunk(folder, 0, count - 1)
        account = Account(READ)
        for document in documents:
            account.add(document, document)
        if not chunk.done:
            chunk.write(documents, [], [account])
        shown.add(account.read, account.kept)
    if count == 0:
        raise DataError(f"no text in {', '.join(cfg.sources)}: every document is empty or was skipped")
    if stamps(inputs.all) != untouched:
        raise DataError("the files of the sources, or of the steps, changed while they were read; run it again")
    left_out = {"empty": omitted.empty, "not_utf8": omitted.invalid}
    write_bytes(done, json.dumps({"chunks": count, "omitted": left_out}).encode())
    return count


def _work(folder: epath.Path, number: int, count: int, processes: int, shown: Progress) -> None:
    """Do the chunks of a stage that are not done yet."""
    (folder / str(number)).mkdir(exist_ok=True)
    shown.start(number, count)
    first, orders = 0, []
    for chunk, before in zip(_chunks(folder, number, count), _chunks(folder, number - 1, count), strict=True):
        if chunk.done:
            shown.read(1)
        else:
            orders.append(Order(number, chunk.number, first))
        first += before.record()["documents"]
    for order in work(folder, orders, min(processes, max(1, len(orders)))):
        accounts = Chunk(folder, number, order.chunk).accounts
        shown.read(1)
        if accounts:
            shown.add(accounts[0].read, accounts[-1].kept)


def _decide(folder: epath.Path, place: int, step: object, chunks: Sequence[Chunk]) -> None:
    assert isinstance(step, CorpusStep)
    if load_learned(folder, place) is None:
        save_learned(folder, place, step.decide(gather_keys(chunks)))


def _chunks(folder: epath.Path, stage: int, count: int) -> list[Chunk]:
    return [Chunk(folder, stage, number) for number in range(count)]


def _totals(chunks: Sequence[Chunk]) -> list[Account]:
    """What each step of a stage did in all of its chunks."""
    totals: list[Account] = []
    for chunk in chunks:
        accounts = chunk.accounts
        totals = totals or [Account(account.step) for account in accounts]
        for total, account in zip(totals, accounts, strict=True):
            total.merge(account)
    return totals


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
