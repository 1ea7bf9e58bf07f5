"""One recipe by `lmjax curate` and, by datatrove, on a Slurm cluster: a table of docs/curation.md.

    python -m analysis.bench.curation_slurm DATA --partition=debug      (needs datatrove and orjson; SLURM_CONF)

DATA holds gutenberg/. The documents are passages of books, junk, and copies of passages with words replaced, so that
their similarity is known; the steps are those of configs/curate/books.py that `launch curate` does. Texts are
compared whole, after the steps that look at a document at a time, and at the end.
"""

import argparse
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from analysis.bench import dirt
from lmjax.data.config import PrepareConfig
from lmjax.data.curate.curate import curate
from lmjax.data.curate.hashing import words
from lmjax.data.curate.recipe import CurateConfig
from lmjax.data.prepare.sources import list_inputs, read_records

PASSAGES, COPIES, JUNK, TASKS = 1000, 100, 100, 4
SIMILARITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
CLEANING = ({"step": "repair"}, {"step": "normalize"}, {"step": "privacy"}, {"step": "repetition"})
CONFIG = "configs/curate/books.py"
LONGEST_SECONDS = 3600.0
"""That the jobs may take, waiting for their turn included."""


def texts_in(folder: Path, kind: str) -> Counter[str]:
    """The documents of the files of one kind."""
    return Counter(str(record["text"]) for record in read_records(list_inputs((f"{folder}/{kind}",)), PrepareConfig()))


def on_cluster(folder: Path, partition: str) -> tuple[Counter[str], Counter[str]]:
    """The documents after the first steps, and at the end. Ends the program where the jobs take too long."""
    command = [sys.executable, "-m", "launch", "curate", f"{CONFIG}:{folder}/in", f"--out={folder}/theirs",
               f"--tasks={TASKS}", f"--partition={partition}"]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + LONGEST_SECONDS
    while (done := len(list(folder.glob("theirs/logs/keep/completions/*")))) < TASKS:
        if time.monotonic() > deadline:
            sys.exit(f"after {LONGEST_SECONDS:,.0f} s {done} of {TASKS} tasks of the last job, theirs-keep, are done; "
                     "see squeue for what waits, and scancel it: its documents are gone")  # fmt: skip
        time.sleep(1.0)
    cleaned, kept = (texts_in(folder / "theirs" / name, "*.jsonl.gz") for name in ("cleaned", "documents"))
    return cleaned, kept


def here(folder: Path) -> tuple[Counter[str], Counter[str]]:
    """The same by `lmjax curate`."""
    found = []
    for name, steps in (("cleaned", CLEANING), ("kept", (*CLEANING, {"step": "near_duplicates"}))):
        curate(CurateConfig(sources={"s": (f"{folder}/in",)}, steps=steps), folder / name, progress=False)
        found.append(texts_in(folder / name, "train-*.jsonl.zst"))
    return found[0], found[1]


def lost(texts: Iterable[str], before: Counter[str], after: Counter[str]) -> int:
    """How many of the texts were there, and are not any more; texts are known by their words."""
    wanted = Counter(map(spelled, texts))
    was, left = (sum((wanted & by_words(found)).values()) for found in (before, after))
    return was - left


def by_words(texts: Counter[str]) -> Counter[str]:
    return Counter(spelled(text) for text in texts.elements())


def spelled(text: str) -> str:
    return " ".join(words(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--partition", required=True)
    arguments = parser.parse_args()
    rng = random.Random(0)
    shard = arguments.data / "gutenberg" / "train-00001-of-00010.jsonl.gz"
    books = dirt.passages(shard, PASSAGES, rng)
    copied = [books[place * COPIES : (place + 1) * COPIES] for place in range(len(SIMILARITIES))]
    copies = [[dirt.altered(text, one, rng) for text in part] for part, one in zip(copied, SIMILARITIES, strict=True)]
    junk = [text for _, text in itertools.islice(dirt.junk(rng), JUNK)]
    documents = [*books, *itertools.chain.from_iterable(copies), *junk]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # which the hosts of a cluster share
        folder = Path(name)
        (folder / "in").mkdir()
        for task in range(TASKS):
            dirt.write(folder / "in" / f"{task}.jsonl", documents[task::TASKS])
        (cleaned, kept), (their_cleaned, their_kept) = here(folder), on_cluster(folder, arguments.partition)
    print(f"{len(documents)} documents; after the first four steps {cleaned.total()} here, {their_cleaned.total()} on "
          f"the cluster, {(cleaned & their_cleaned).total()} the same")  # fmt: skip
    print(f"kept: {kept.total()} here, {their_kept.total()} on the cluster, {(kept & their_kept).total()} the same")
    print("| similarity | copies | dropped here | by datatrove |\n| --- | --- | --- | --- |")
    for similarity, originals, part in zip(SIMILARITIES, copied, copies, strict=True):
        both = [*originals, *part]
        print(f"| {similarity} | {len(part)} | {lost(both, cleaned, kept)} | {lost(both, cleaned, their_kept)} |")


if __name__ == "__main__":
    main()
