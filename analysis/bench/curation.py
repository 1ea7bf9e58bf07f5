"""How well and how fast the steps of `lmjax curate` work, on text made dirty on purpose: tables of docs/curation.md.

    python -m analysis.bench.curation DATA

DATA holds gutenberg/ (JSON lines of books), tinystories/, persian/ (poets) and eval/. Passages of books are the clean
text, and what is planted in them is known, so precision and recall are counted. Of the documents that a step dropped or
changed, precision is the share that it should have; of those that it should, recall is the share that it did, where
what is mended has to be mended exactly. Similarities are computed from sets of runs of words, without hashes. Speeds
are of one process, in CPU time.
"""

import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from analysis.bench import dirt
from analysis.bench.dirt import Case, clean
from lmjax.data.config import PrepareConfig
from lmjax.data.curate.curate import curate
from lmjax.data.curate.document import Document
from lmjax.data.curate.recipe import CurateConfig, parse_step
from lmjax.data.curate.step import DocumentStep
from lmjax.data.prepare.sources import list_inputs, read_records

PLANTED = 200
CLEAN = 1000
SIMILARITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)

Step = dict[str, Any]


class Row(NamedTuple):
    """One line of the table."""

    step: str
    planted: str
    documents: int
    precision: float
    recall: float

    def __str__(self) -> str:
        return f"| {self.step} | {self.planted} | {self.documents} | {self.precision:.3f} | {self.recall:.3f} |"


def run(step: Step, texts: Sequence[str]) -> list[str | None]:
    """What a step leaves of each text, None for nothing, through files as from the command line."""
    with tempfile.TemporaryDirectory() as folder:
        source = dirt.write(Path(folder) / "a.jsonl", texts)
        cfg = CurateConfig(sources={"s": (source,)}, steps=(step,), workers=1)
        curate(cfg, f"{folder}/out", progress=False)
        left: list[str | None] = [None] * len(texts)
        for record in read_records(list_inputs((f"{folder}/out/*.jsonl.zst",)), PrepareConfig()):
            left[int(record["name"].rpartition(" ")[2]) - 1] = record["text"]
    return left


def measured(step: Step, planted: str, cases: Sequence[Case], background: Sequence[str]) -> Row:
    """Precision and recall of a step over planted cases among clean documents."""
    mixed = [*cases, *clean(*background)]
    left = run(step, [case.text for case in mixed])
    touched = [after != case.text for case, after in zip(mixed, left, strict=True)]
    right = [after == case.wanted for case, after in zip(mixed, left, strict=True)]
    due = [case.wanted != case.text for case in mixed]
    hits = sum(was and good for was, good in zip(due, right, strict=True))
    return Row(step["step"], planted, sum(due), hits / max(1, sum(touched)), hits / max(1, sum(due)))


def per_document(data: Path, rng: random.Random) -> Iterator[Row]:
    """Steps that look at one document at a time."""
    books = dirt.passages(data / "gutenberg" / "train-00000-of-00010.jsonl.gz", 8000, rng)
    plain = books[:CLEAN]
    foreign = [text for text in books[CLEAN:] if not text.isascii() and dirt.is_cp1252(text)][:PLANTED]
    yield measured({"step": "repair"}, "UTF-8 read as Windows-1252", [dirt.mojibake(text) for text in foreign], plain)
    spaced = [dirt.badly_spaced(text, rng) for text in books[CLEAN : CLEAN + PLANTED]]
    yield measured({"step": "normalize"}, "marks without width, line ends of Windows", spaced, plain)
    poets = dirt.verse(data / "persian", PLANTED, rng)
    tidy = ["\n".join(filter(None, map(str.strip, text.splitlines()))) for text in poets]
    cases = [dirt.on_another_keyboard(text) for text in tidy]
    yield measured({"step": "normalize", "persian": True}, "yeh and kaf of Arabic in Persian verse", cases, plain)
    lookalikes = [dirt.public(text, rng).text for text in books[CLEAN : CLEAN + PLANTED]]
    for place, what in enumerate(dirt.PRIVATE, 2):
        cases = [dirt.private(text, what, rng) for text in books[CLEAN + place * PLANTED :][:PLANTED]]
        yield measured({"step": "privacy"}, what, cases, [*plain, *lookalikes])
    yield measured({"step": "language", "keep": ["en"]}, "Persian verse among English", _drop(poets), plain)
    yield measured({"step": "language", "keep": ["fa"]}, "English among Persian verse", _drop(plain[:PLANTED]), poets)
    junk: dict[str, list[str]] = {}
    for what, text in itertools.islice(dirt.junk(rng), 4 * PLANTED):
        junk.setdefault(what, []).append(text)
    for step, kinds in (("gopher", ("tables of numbers", "symbols")), ("repetition", ("one line again and again",)),
                        ("c4", ("menus",)), ("fineweb", ("menus", "one line again and again"))):  # fmt: skip
        settings = {"end_in_punctuation": False} if step == "c4" else {}
        cases = _drop([text for kind in kinds for text in junk[kind]])
        yield _drops({"step": step, **settings}, ", ".join(kinds), cases, plain)
    yield _extraction(books[CLEAN : CLEAN + PLANTED], rng)


def _drop(texts: Sequence[str]) -> list[Case]:
    return [Case(text, None) for text in texts]


def _drops(step: Step, planted: str, cases: Sequence[Case], background: Sequence[str]) -> Row:
    """`measured` for steps that change documents, too: what counts is which ones they drop."""
    left = run(step, [*background, *(case.text for case in cases)])  # of duplicates the first is kept
    wrong, hits = (sum(after is None for after in part) for part in (left[: len(background)], left[len(background) :]))
    return Row(step["step"], planted, len(cases), hits / max(1, hits + wrong), hits / len(cases))


def _extraction(texts: Sequence[str], rng: random.Random) -> Row:
    """Of words: those that are extracted, and those that are of the passage."""
    left = run({"step": "extract"}, [dirt.page(text, rng) for text in texts])
    precision = recall = 0.0
    for text, after in zip(texts, left, strict=True):
        wanted, found = set(text.split()), set((after or "").split()) - {"A", "passage"}  # the heading
        precision += len(wanted & found) / max(1, len(found))
        recall += len(wanted & found) / len(wanted)
    return Row("extract", "web pages around passages (words)", len(texts), precision / len(texts), recall / len(texts))


def duplicates(data: Path, rng: random.Random) -> Iterator[Row]:
    """Passes over all documents."""
    books = dirt.passages(data / "gutenberg" / "train-00001-of-00010.jsonl.gz", 8000, rng)
    plain = books[:CLEAN]
    copies = _drop([dirt.respelled(text, rng) for text in rng.sample(plain, PLANTED)])
    yield _drops({"step": "exact_duplicates"}, "copies in other case and punctuation", copies, plain)
    yield from _near(books[CLEAN : CLEAN + PLANTED * len(SIMILARITIES)])
    notices = dirt.notices(rng)
    cases = [Case(f"{rng.choice(notices)}\n\n{text}", text) for text in books[CLEAN : CLEAN + PLANTED]]
    step = {"step": "repeated_parts", "most": 5, "keep_first": False}
    yield measured(step, "three notices, each in some 67 documents", cases, plain)
    lines = dirt.navigation(rng)
    cases = [Case(f"{rng.choice(lines)}\n{text}", text) for text in books[CLEAN : CLEAN + PLANTED]]
    yield measured(step | {"part": "line"}, "three lines, each in some 67 documents", cases, plain)


def _near(books: Sequence[str]) -> Iterator[Row]:
    """Copies at known similarities: what is right is decided by the exact one, of sets of words."""
    rng = random.Random(1)
    pairs = [(text, similarity) for text, similarity in zip(books, itertools.cycle(SIMILARITIES), strict=False)]
    copies = [dirt.altered(text, similarity, rng) for text, similarity in pairs]
    left = run({"step": "near_duplicates"}, [*books, *copies])[len(books) :]
    due = [dirt.jaccard(text, copy) >= 0.8 for text, copy in zip(books, copies, strict=True)]
    dropped = [after is None for after in left]
    for similarity in SIMILARITIES:
        chosen = [n for n, (_, one) in enumerate(pairs) if one == similarity]
        share = sum(dropped[n] for n in chosen) / len(chosen)
        print(f"near duplicates at {similarity}: {len(chosen)} pairs, {share:.3f} dropped")
    hits = sum(a and b for a, b in zip(due, dropped, strict=True))
    yield Row("near_duplicates", "copies at 0.5 to 0.95, of which at 0.8 or more", sum(due), hits / sum(dropped),
              hits / sum(due))  # fmt: skip


def contamination(data: Path, rng: random.Random) -> Iterator[Row]:
    """Items of evaluation sets between the paragraphs of passages."""
    books = dirt.passages(data / "gutenberg" / "train-00002-of-00010.jsonl.gz", 2000, rng)
    plain, hosts = books[:CLEAN], books[CLEAN : CLEAN + PLANTED]
    names = ("lambada_openai", "hellaswag_1000", "arc_easy")
    step = {"step": "decontaminate", "sets": {name: str(data / "eval" / f"{name}.jsonl") for name in names}}
    found = [text for name in names for text in dirt.items(data / "eval" / f"{name}.jsonl")]
    chosen = rng.sample(found, len(hosts))
    ways: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("items as they are", str),
        ("items in other case and punctuation", lambda item: dirt.respelled(item, rng)),
        ("items with every twentieth word replaced", lambda item: dirt.paraphrased(item, 20)),
        ("items with every eighth word replaced", lambda item: dirt.paraphrased(item, 8)),
    )
    for what, way in ways:
        texts = [f"{host}\n\n{way(item)}\n\n{host[::-1]}" for host, item in zip(hosts, chosen, strict=True)]
        yield measured(step, what, _drop(texts), plain)


def quality(data: Path, rng: random.Random) -> Iterator[Row]:
    """Stories for children among passages of books, told apart by other stories and other books."""
    stories = [str(record["text"]) for record in read_records(
        list_inputs((str(data / "tinystories" / "stories.jsonl.gz"),)), PrepareConfig())]  # fmt: skip
    plain = dirt.passages(data / "gutenberg" / "valid.jsonl.gz", CLEAN, rng)
    with tempfile.TemporaryDirectory() as folder:
        bad = dirt.write(Path(folder) / "bad.jsonl", stories[:1000])
        good = str(data / "gutenberg" / "train-00003-of-00010.jsonl.gz")
        step = {"step": "quality", "good": [good], "bad": [bad], "passage_words": 100}
        yield measured(step, "stories for children among books", _drop(stories[1000 : 1000 + PLANTED]), plain)


STEPS: tuple[Step, ...] = (
    {"step": "extract"}, {"step": "repair"}, {"step": "normalize"}, {"step": "language"}, {"step": "gopher"},
    {"step": "repetition"}, {"step": "c4"}, {"step": "fineweb"}, {"step": "privacy"}, {"step": "held_out"},
    {"step": "exact_duplicates"}, {"step": "near_duplicates"}, {"step": "repeated_parts", "least_characters": 200},
)  # fmt: skip


def speeds(data: Path, rng: random.Random) -> Iterator[str]:
    """Documents and megabytes per second of CPU time of each step; of passes, less what reading and writing take."""
    texts = dirt.passages(data / "gutenberg" / "train-00000-of-00010.jsonl.gz", 4000, rng)
    size = sum(len(text.encode()) for text in texts) / 1e6
    base = _seconds(run, {"step": "held_out"}, texts)
    yield f"reading, writing, counting: {len(texts) / base:,.0f} documents/s, {size / base:.1f} MB/s"
    for values in STEPS:
        name, step = parse_step(0, values)
        if isinstance(step, DocumentStep):
            function = step.start(step.fit().arrays)
            given = [dirt.page(text, rng) for text in texts] if name == "extract" else texts
            documents = [Document(text, "s/1", "s") for text in given]
            used = _seconds(list, map(function, documents))
        else:
            used = _seconds(run, values, texts) - base
        yield f"| {name} | {len(texts) / used:,.0f} | {size / used:.1f} |"


def _seconds(work: Callable[..., object], *arguments: object) -> float:
    began = time.process_time()
    work(*arguments)
    return time.process_time() - began


def main() -> None:
    data = Path(sys.argv[1])
    print("| step | planted | documents | precision | recall |\n| --- | --- | --- | --- | --- |")
    for measure in (per_document, duplicates, contamination, quality):
        for row in measure(data, random.Random(0)):
            print(row, flush=True)
    for line in speeds(data, random.Random(0)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
