"""Is a model better for curation, at equal tokens? A table of docs/curation.md.

    python -m analysis.bench.curated_training DATA --out=DIR [--seeds 3] [--passages 240]

DATA holds gutenberg/ (JSON lines of books) and persian/ (poets). A corpus is made dirty: half of its bytes are passages
of books, each once, the rest copies, junk and another language, in the shares that are printed. Four corpora come of
it: the whole, and what is left of it after the filters alone, the deduplication alone, and both. On each of them a
model with two of the quickstart's four layers is trained, from the same seeds, for as many steps as an epoch of the
dirty whole takes, with one tokenizer, learned from the dirty whole. All are measured on the same passages of other
books, to which nothing was done. Differences are paired by seed. What is done in DIR is not done again, so the command
can be stopped and started.
"""

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from analysis.bench import dirt
from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.curate.curate import curate
from lmjax.data.curate.recipe import CurateConfig
from lmjax.data.prepare.prepare import prepare
from lmjax.data.store.manifest import read_manifest

VALIDATION, BATCH, SEQ_LEN = 200, 8, 256
SHARES = {
    "passages of books, each once": 0.5,
    "copies": 0.125,
    "near copies, at 0.8 to 0.95": 0.125,
    "menus, tables, symbols, one line again and again": 0.2,
    "Persian verse": 0.05,
}
"""Of the bytes. The first are spoilt, as `spoilt` has it."""
COPIED = 100
"""So many of the passages are copied, the most popular one most: number r with weight 1 / r, as on the web few pages
are copied very often (Lee et al., Deduplicating training data makes language models better, 2022)."""

Steps = tuple[dict[str, Any], ...]

FILTERS: Steps = (
    {"step": "extract"},
    {"step": "repair"},
    {"step": "normalize"},
    {"step": "language", "keep": ("en",)},
    {"step": "repetition"},
    {"step": "gopher"},
)
DEDUPLICATION: Steps = (
    {"step": "exact_duplicates"},
    {"step": "near_duplicates"},
    {"step": "repeated_parts", "part": "paragraph", "most": 5, "keep_first": False},
)
CORPORA: dict[str, Steps] = {
    "dirty": (),
    "filtered": FILTERS,
    "deduplicated": DEDUPLICATION,
    "both": FILTERS + DEDUPLICATION,
}


# The corpus -----------------------------------------------------------------------------------------------------------


def dirty_corpus(books: Sequence[str], poets: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """(what it is, text) of all documents, shuffled: the passages of books are half of the bytes, as SHARES has it."""
    first, *others = SHARES
    kinds = (
        copies(books, rng),
        (dirt.altered(text, rng.uniform(0.8, 0.95), rng) for text in copies(books, rng)),
        (text for _, text in dirt.junk(rng)),
        itertools.cycle(poets),
    )
    notices = dirt.notices(rng)
    documents = [(first, spoilt(text, notices, rng)) for text in books]
    unit = sum(len(text.encode()) for _, text in documents) / SHARES[first]
    for what, texts in zip(others, kinds, strict=True):
        documents += [(what, text) for text in filled(texts, unit * SHARES[what])]
    rng.shuffle(documents)
    return documents


def copies(books: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Passages as they are, a few of them very often."""
    chosen = books[:COPIED]
    while True:
        yield from rng.choices(chosen, [1 / rank for rank in range(1, len(chosen) + 1)])


def spoilt(text: str, notices: Sequence[str], rng: random.Random) -> str:
    """A tenth of the passages are web pages, a tenth wrongly decoded where they can be, and three tenths have one of a
    few notices before them."""
    draw = rng.random()
    if draw < 0.1:
        return dirt.page(text, rng)
    if draw < 0.2 and dirt.is_cp1252(text):
        return dirt.mojibake(text).text
    return f"{rng.choice(notices)}\n\n{text}" if draw > 0.7 else text


def filled(texts: Iterable[str], size: float) -> Iterator[str]:
    """Texts until they have so many bytes."""
    for text in texts:
        if size <= 0:
            return
        size -= len(text.encode())
        yield text


def make_corpora(data: Path, passages: int, out: Path) -> None:
    """Write the dirty documents and those for validation, and prepare each corpus of the recipes."""
    rng = random.Random(0)
    shards = sorted((data / "gutenberg").glob("train-*.jsonl.gz"))
    books = [text for shard in shards[:2] for text in dirt.passages(shard, passages // 2, rng)]
    documents = dirty_corpus(books, dirt.verse(data / "persian", passages, rng), rng)
    sizes = Counter[str]()
    for what, text in documents:
        sizes[what] += len(text.encode())
    for what, size in sizes.items():
        print(f"{what}: {size / 1e6:.2f} MB, {size / sizes.total():.1%}; of {len(documents)} documents "
              f"{sum(kind == what for kind, _ in documents)}")  # fmt: skip
    source = dirt.write(out / "dirty.jsonl", [text for _, text in documents])
    clean = dirt.write(out / "valid.jsonl", dirt.passages(data / "gutenberg" / "valid.jsonl.gz", VALIDATION, rng))
    held_out = ({"step": "held_out", "sources": ("clean",)},)
    curate(CurateConfig(sources={"clean": (clean,)}, steps=held_out), out / "validation", progress=False)
    for name, steps in CORPORA.items():
        curate(CurateConfig(sources={"web": (source,)}, steps=steps), out / name, progress=False)
        known = TokenizerConfig(kind="file", path=str(out / "dirty-tokens" / "tokenizer"))
        tokenizer = TokenizerConfig(kind="bpe", vocab=2048) if name == "dirty" else known
        inputs = (str(out / name), str(out / "validation"))
        prepare(PrepareConfig(inputs=inputs, tokenizer=tokenizer), out / f"{name}-tokens", progress=False)


# Training -------------------------------------------------------------------------------------------------------------


def train(name: str, seeds: int, out: Path) -> None:
    """The model on a corpus, with every seed, through one step."""
    steps = read_manifest(out / "dirty-tokens").splits["train"].tokens // (BATCH * SEQ_LEN)
    own = "--config.data.sources.own"
    shared = [f"--config=configs/own_text.py:{out / name}", f"{own}.path={out / name}-tokens", f"{own}.prepare=None",
              f"--config.train.steps={steps}", f"--config.train.evaluate_every={steps}",
              f"--config.train.batch={BATCH}", f"--config.data.seq_len={SEQ_LEN}", "--config.model.layers=2",
              "--config.train.sample.prompts=()", "--config.train.compression_baseline=False"]  # fmt: skip
    runs = [["--", f"--workdir={workdir(out, name, seed)}", f"--config.train.seed={seed}", f"--config.data.seed={seed}"]
            for seed in range(seeds)]  # fmt: skip
    words = [sys.executable, "-m", "lmjax", "train", *shared, *itertools.chain.from_iterable(runs)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def workdir(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / f"{name}-{seed}"


def table(seeds: int, out: Path) -> Iterator[str]:
    """What was left of the corpus, and bits per byte on the clean passages: mean and standard error over seeds."""
    yield "| corpus | documents | MB | epochs | bits per byte | less than of the dirty one |"
    yield "| --- | --- | --- | --- | --- | --- |"
    found: dict[str, list[float]] = {}
    for name in CORPORA:
        kept = json.loads((out / name / "curation.json").read_text())["steps"][-1]["kept"]
        summaries = [json.loads((workdir(out, name, seed) / "summary.json").read_text()) for seed in range(seeds)]
        found[name] = [summary["val_full/own/bpb"] for summary in summaries]
        epochs = summaries[0]["epochs/own"]
        gain = [before - after for before, after in zip(found["dirty"], found[name], strict=True)]
        yield (f"| {name} | {kept[0]:,} | {kept[1] / 1e6:.2f} | {epochs:.2f} | "
               f"{mean(found[name])} | {mean(gain) if any(gain) else ''} |")  # fmt: skip


def mean(values: Sequence[float]) -> str:
    """With its standard error."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passages", type=int, default=240, help="of books, each once: half of the bytes")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_corpora(arguments.data, arguments.passages, arguments.out)
    for name in CORPORA:
        train(name, arguments.seeds, arguments.out)
    for line in table(arguments.seeds, arguments.out):
        print(line)


if __name__ == "__main__":
    main()
