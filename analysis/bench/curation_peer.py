"""The rules of quality beside datatrove's: do they decide alike, and how fast are they: a table of docs/curation.md.

    python -m analysis.bench.curation_peer DATA        (needs datatrove, spacy and nltk)

The texts are passages of books, half of them made worse by more or less, with straight quotation marks, which datatrove
alone knows. Both have the thresholds of the papers, and words are what white space separates, as there; datatrove's own
words, of spaCy, are cut at punctuation. Speed is in CPU time of one process, datatrove's with white space, too.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document as Peer
from datatrove.pipeline import filters
from datatrove.pipeline.filters import gopher_quality_filter, gopher_repetition_filter

from analysis.bench import dirt
from lmjax.data.curate.document import Document, Dropped
from lmjax.data.curate.recipe import parse_step
from lmjax.data.curate.step import DocumentStep

TEXTS = 1000
STRAIGHT = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})
MARKS = (".", "!", "?", '"', "'")


def peers() -> Iterator[tuple[str, Any]]:
    """datatrove's filters by the names of our steps."""
    gopher_quality_filter.split_into_words = gopher_repetition_filter.split_into_words = _words
    yield "gopher", filters.GopherQualityFilter()
    yield "repetition", filters.GopherRepetitionFilter()
    yield "c4", filters.C4QualityFilter(min_num_sentences=3, min_words_per_line=5)
    yield "fineweb", filters.FineWebQualityFilter(char_duplicates_ratio=0.1, new_line_ratio=1e9, stop_chars=MARKS)


def _words(text: str, language: str) -> list[str]:
    return text.split()


def ours(name: str) -> Callable[[str], bool]:
    """Whether our step drops a text."""
    _, step = parse_step(0, {"step": name})
    assert isinstance(step, DocumentStep)
    function = step.start({})
    return lambda text: isinstance(function(Document(text, "", "")), Dropped)


def by(peer: Any, first: str) -> Callable[[str], bool]:
    """Whether datatrove's filter drops a text; it has seen a first one, for which it loads what it needs."""
    peer.filter(Peer(text=first, id=""))
    return lambda text: peer.filter(Peer(text=text, id="")) is not True


def timed(decide: Callable[[str], bool], texts: Sequence[str]) -> tuple[list[bool], float]:
    """Which texts are dropped, and texts per second."""
    began = time.process_time()
    dropped = [decide(text) for text in texts]
    return dropped, len(texts) / (time.process_time() - began)


def main() -> None:
    rng = random.Random(0)
    books = dirt.passages(Path(sys.argv[1]) / "gutenberg" / "train-00000-of-00010.jsonl.gz", TEXTS, rng)
    half = len(books) // 2
    worse = [dirt.borderline(text, rng) for text in books[half:]]
    texts = [text.translate(STRAIGHT) for text in (*books[:half], *worse)]
    print("| step | dropped | by datatrove | alike | documents/s | datatrove's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, peer in peers():
        mine, speed = timed(ours(name), texts)
        theirs, peer_speed = timed(by(peer, texts[0]), texts)
        alike = sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(texts)
        speeds = f"{speed:,.0f} | {peer_speed:,.0f}"
        print(f"| `{name}` | {sum(mine)} | {sum(theirs)} | {alike:.1%} | {speeds} |", flush=True)


if __name__ == "__main__":
    main()
