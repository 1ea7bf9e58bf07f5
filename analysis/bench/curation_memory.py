"""Memory and speed of a whole recipe on a gigabyte of text: figures of docs/curation.md.

    python -m analysis.bench.curation_memory DATA [--config=configs/curate/books.py] [--gigabytes=1] [--workers=2]
    python -m analysis.bench.curation_memory --pass-alone [--gigabytes=1]

The text is the passages of the books in DATA/gutenberg, again and again until there is enough of it, each time with
three words of ten replaced by others of the books, so that no two of a passage are near duplicates; every tenth is an
exact copy, every fifth a web page. Memory is the resident set, mapped files included, looked at twenty times a second:
of all processes together, where what they share counts for each, and of the largest. CPU time is that of all.

All that grows with the corpus is what a pass holds while it decides, in one process, and of all passes near duplicates
hold most. `--pass-alone` has it decide over keys that were drawn: as many as such a corpus has, of documents of 400
words, a tenth of them copies of the one before.
"""

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from etils import epath

from analysis.bench import dirt
from lmjax.data.curate.chunk import Chunk, gather_keys
from lmjax.data.curate.document import Document
from lmjax.data.curate.near_duplicates import NearDuplicates

REPLACED = 0.3
COPIES, PAGES = 10, 5
CHUNK_DOCUMENTS = 3500
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def documents(books: list[str], size: float, rng: random.Random) -> Iterator[str]:
    """Texts of `size` bytes in all."""
    vocabulary = sorted({word for text in books for word in text.split()})
    number = 0
    while size > 0:
        for text in books:
            words = text.split(" ")
            if number % COPIES:
                chosen = rng.sample(range(len(words)), int(REPLACED * len(words)))
                for place, word in zip(chosen, rng.choices(vocabulary, k=len(chosen)), strict=True):
                    words[place] = word
            made = " ".join(words)
            made = made if number % PAGES else dirt.page(made, rng)
            yield made
            number += 1
            size -= len(made.encode())
            if size <= 0:
                return


def resident(root: int) -> list[int]:
    """Bytes of the process and of each of its descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(") ")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(folder.name)] = (int(stat[1]), int(stat[21]) * _PAGE_BYTES)
    family = {root}
    while more := {pid for pid, (parent, _) in parents.items() if parent in family} - family:
        family |= more
    return [parents[pid][1] for pid in family if pid in parents]


def decide_alone(gigabytes: float) -> str:
    """What near duplicates take to decide over keys of so much text."""
    rng = np.random.default_rng(0)
    document = Document("", "", "")
    with tempfile.TemporaryDirectory() as name:
        folder = epath.Path(name)
        (folder / "1").mkdir()
        chunks = [Chunk(folder, 1, number) for number in range(math.ceil(gigabytes * 1e9 / CHUNK_DOCUMENTS / 2400))]
        for chunk in chunks:
            keys = [_drawn(rng) for _ in range(CHUNK_DOCUMENTS)]
            keys[COPIES::COPIES] = keys[COPIES - 1 : -1 : COPIES]
            chunk.write([document] * CHUNK_DOCUMENTS, keys, [])
        before, began = _peak(), time.process_time()
        learned = NearDuplicates().decide(gather_keys(chunks))
        seconds = time.process_time() - began
    return (f"near_duplicates alone, {len(chunks) * CHUNK_DOCUMENTS:,} documents: {_peak():,.0f} MB, {before:,.0f} MB "
            f"of it before, {seconds:,.0f} s of CPU time, {learned.facts['pairs_joined']:,} pairs joined")  # fmt: skip


def _drawn(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Keys of a document that is like no other."""
    runs = rng.integers(0, 1 << 32, 400, np.uint64).astype(np.uint32)
    return {"bands": rng.integers(0, 1 << 63, NearDuplicates().bands, np.uint64), "runs": np.unique(runs)}


def _peak() -> float:
    """Megabytes of this process, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--pass-alone", action="store_true")
    parser.add_argument("--config", default="configs/curate/books.py")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.pass_alone:
        print(decide_alone(arguments.gigabytes))
        return
    if arguments.data is None:
        parser.error("say where the texts are: DATA, with gutenberg/ in it")
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        shards = sorted((arguments.data / "gutenberg").glob("train-*.jsonl.gz"))
        books = [text for shard in shards for text in dirt.passages(shard, 1 << 20, rng)]
        with corpus.open("w") as file:
            for text in documents(books, arguments.gigabytes * 1e9, rng):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        command = [sys.executable, "-m", "lmjax", "curate", f"{arguments.config}:{corpus}", f"--out={folder}/out",
                   f"--workers={arguments.workers}"]  # fmt: skip
        began, largest, together = time.monotonic(), 0, 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            sizes = resident(process.pid)
            largest, together = max([largest, *sizes]), max(together, sum(sizes))
            time.sleep(0.05)
        if process.returncode:
            sys.exit(process.returncode)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        steps = json.loads((Path(folder) / "out" / "curation.json").read_text())["steps"]
    read, kept = steps[0]["read"], steps[-1]["kept"]
    seconds = used.ru_utime + used.ru_stime
    print(f"{arguments.config}, {arguments.workers} workers: {read[0]:,} documents, {read[1] / 1e9:.2f} GB, "
          f"{kept[0]:,} kept")  # fmt: skip
    print(f"memory: {together / 1e6:,.0f} MB in all, {largest / 1e6:,.0f} MB of the largest process")
    print(f"{seconds:,.0f} s of CPU time, {read[0] / seconds:,.0f} documents/s; {time.monotonic() - began:,.0f} s")


if __name__ == "__main__":
    main()
